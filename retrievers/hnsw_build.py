"""Makes an HNSW graph chunk by chunk, so that a build that was killed goes on and ends with the same bytes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadKnowledge, MissingExtra
from .kernel import Source
from .vectors import Vectors

_LINE = 4096  # bytes; the last line of a checkpoint is shorter


class HNSWBuild:
    """One build of `HNSWDense.build`, which says what is promised.

    faiss grows the graph and could save it with the vectors, but the vectors are on the disk already: a checkpoint is
    the graph alone, as faiss writes it, and then one line of JSON with what it belongs to and the graph's checksum.
    """

    def __init__(self, vectors: Source, path: Path, *, m: int, ef_construction: int, seed: int, chunk: int) -> None:
        try:
            import faiss
        except ImportError:
            raise MissingExtra("building an HNSW index needs: pip install 'ralmspec[local]'") from None
        self._faiss: Any = faiss
        self._vectors = Vectors.open(vectors)
        self._path, self._checkpoint = path, path.with_name(path.name + ".checkpoint")
        self._seed, self._chunk = seed, chunk
        self._arguments = {
            "m": m,
            "ef_construction": ef_construction,
            "seed": seed,
            "chunk": chunk,
            "vectors": [len(self._vectors), self._vectors.dimension, self._vectors.kind],
            "faiss": faiss.__version__,
        }
        if self._vectors.metric != "inner product":  # the default has no word, so that older checkpoints go on
            self._arguments["metric"] = self._vectors.metric
        self._read = hashlib.sha256()  # over the vectors that are in the graph, as they are stored
        self._graph: Any = faiss.IndexHNSWFlat(self._vectors.dimension, m, self._vectors.faiss_metric)
        self._graph.hnsw.efConstruction = ef_construction
        self._storage = self._vectors.empty_faiss()
        room = len(self._vectors) * self._storage.sa_code_size()
        self._storage.codes.resize(room)  # once for all vectors: memory that grows is copied each time
        self._storage.codes.resize(0)

    def run(self, *, threads: int, checkpoint: int, tell: Callable[[int, int], None]) -> None:
        """Goes on from the checkpoint, if there is one, to the end."""
        total, done = len(self._vectors), self._resume()
        self._graph.storage, self._graph.own_fields = self._storage, False
        saved = done
        tell(done, total)
        while done < total:
            rows = self._next(done)
            self._faiss.omp_set_num_threads(threads)
            # faiss draws a vector's level from a generator that it does not save, so each chunk has a fresh one.
            (start,) = np.random.SeedSequence([self._seed, done]).generate_state(1)
            self._graph.hnsw.rng = self._faiss.RandomGenerator(int(start))
            self._graph.add(rows)
            done += len(rows)
            if done == total:
                self._save(self._path)
                self._checkpoint.unlink(missing_ok=True)
            elif done - saved >= max(checkpoint, saved // 8):
                self._save(self._checkpoint, {**self._arguments, "done": done, "read": self._read.hexdigest()})
                saved = done
            tell(done, total)

    def _next(self, done: int) -> NDArray[np.float32]:
        self._read.update(self._vectors.stored[done : done + self._chunk].data)
        return self._vectors.block(done, done + self._chunk)

    def _resume(self) -> int:
        """Takes up the checkpoint's graph, if there is one; how many vectors are in it."""
        try:
            done, read, arguments = self._last_line()
        except FileNotFoundError:
            return 0
        for start in range(0, done if arguments == self._arguments else 0, self._chunk):
            self._storage.add(self._next(start))
        if arguments != self._arguments or read != self._read.hexdigest():
            raise BadKnowledge(
                f"{self._checkpoint}: was left by a build with other arguments, vectors or version of faiss; "
                "build with those, or take it away to begin anew"
            )
        self._graph = self._faiss.read_index(str(self._checkpoint))
        return done

    def _last_line(self) -> tuple[int, str, dict[str, Any]]:
        """Of the checkpoint: the vectors in it, their checksum, and the arguments; once the graph's checksum fits."""
        with self._checkpoint.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LINE))
            line = file.read().rpartition(b"\n")[2]
            file.seek(0)
            left, graph = size - len(line), hashlib.sha256()
            while block := file.read(min(left, 1 << 20)):
                graph.update(block)
                left -= len(block)
        try:
            facts = json.loads(line)
            done, read = int(facts.pop("done")), str(facts.pop("read"))
            if facts.pop("graph") != graph.hexdigest():
                raise ValueError("another checksum")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadKnowledge(f"{self._checkpoint}: is damaged; take it away to begin anew") from None
        return done, read, facts

    def _save(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """The graph alone, to `path` in one rename; with `facts` as a last line."""
        draft = path.with_name(path.name + ".new")
        try:
            self._faiss.write_index(self._graph, str(draft), self._faiss.IO_FLAG_SKIP_STORAGE)
            with draft.open("r+b") as file:
                if facts is not None:
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                    file.seek(0)
                    facts["graph"] = hashlib.file_digest(file, "sha256").hexdigest()
                    file.write(json.dumps(facts).encode())
                    file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except (OSError, RuntimeError) as error:
            raise BadKnowledge(f"{path}: cannot be written ({error})") from error
