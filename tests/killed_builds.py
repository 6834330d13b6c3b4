"""A program for tests of building: builds in children that kill themselves, until one gets through.

    python killed_builds.py index SOURCE FOLDER KINDS EMBEDDINGS SEED
    python killed_builds.py datastore TEXT FOLDER KINDS MODEL SEED

Each child is forked from a process that has loaded everything and used nothing, so it starts at once and its thread
pools are its own. It dies by SIGKILL at a random call of `tell`. Prints how many died.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import faiss  # noqa: F401

from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore
from ralmspec.retrievers.folder import Tell
from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import BuildOptions


def index(source: str, folder: str, kinds: str, embeddings: str) -> Callable[[Tell], object]:
    import sentence_transformers  # noqa: F401

    given = Path(embeddings) if embeddings else None
    options = BuildOptions(kinds=tuple(kinds.split(",")), embeddings=given, ivf_lists=8)
    return lambda tell: build_index(source, folder, options, tell=tell)


def datastore(text: str, folder: str, kinds: str, path: str) -> Callable[[Tell], object]:
    import torch

    from ralmspec.stages.transformers_model import TransformersModel

    torch.set_num_threads(1)  # one thread needs no pool, which would not survive the fork
    model = TransformersModel.load(path)
    options = DatastoreOptions(kinds=tuple(kinds.split(",")), window=64, context=20, batch=3, ivf_lists=8)
    return lambda tell: build_datastore([text], folder, model, options, tell=tell)


def main(what: str, source: str, folder: str, kinds: str, made_with: str, seed: str) -> None:
    build = {"index": index, "datastore": datastore}[what](source, folder, kinds, made_with)
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

            build(tell)
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
