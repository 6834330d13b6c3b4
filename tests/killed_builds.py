"""A program for test_index_build.py: builds an index in children that kill themselves, until one gets through.

    python killed_builds.py SOURCE FOLDER KINDS EMBEDDINGS SEED

Each child is forked from a process that has loaded everything and used nothing, so it starts at once and its thread
pools are its own. It dies by SIGKILL at a random call of `tell`. Prints how many died.
"""

import os
import random
import signal
import sys
from pathlib import Path

import faiss  # noqa: F401
import sentence_transformers  # noqa: F401

from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import BuildOptions


def main(source: str, folder: str, kinds: str, embeddings: str, seed: str) -> None:
    options = BuildOptions(
        kinds=tuple(kinds.split(",")), embeddings=Path(embeddings) if embeddings else None, ivf_lists=8
    )
    generator = random.Random(int(seed))
    died = 0
    while True:
        left = generator.randint(1, 24)  # checksums alone take about 14 calls, and begin anew each time
        if (child := os.fork()) == 0:

            def tell(part: str, done: int, total: int) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            build_index(source, folder, options, tell=tell)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert not Path(folder).exists(), "what a killed build leaves must not load"
        died += 1
        assert died < 1000, "it never gets on"
    sys.stdout.write(f"{died}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
