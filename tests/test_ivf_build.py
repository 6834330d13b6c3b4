"""What IVFDense.build puts into its file, how it samples, and that a file is there whole or not at all."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import KINDS, some
from numpy.typing import NDArray

from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.ivf import IVFDense
from ralmspec.retrievers.vectors import Kind, Vectors, narrow

if find_spec("faiss") is None:
    pytest.skip("needs faiss (the extra 'local')", allow_module_level=True)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_held_as_they_are_stored_without_any_rounding(kind: Kind, tmp_path: Path) -> None:
    """Also those too large for the other half precision: a copy that is rounded would rank otherwise."""
    import faiss

    vectors = some() * (1 if kind == "float16" else 1e6)
    stored = Vectors.open(narrow(vectors.astype(np.float32), kind))
    IVFDense.build(stored, tmp_path / "index", lists=10)
    index: Any = faiss.read_index(str(tmp_path / "index"))
    index.make_direct_map()
    held = np.stack([index.reconstruct(row) for row in range(len(stored))])
    assert np.array_equal(held, stored.block(0, len(stored)))


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int64]]:
    """Which vectors each build that follows was trained on."""
    taken: list[NDArray[np.int64]] = []
    take = Vectors.take

    def note(vectors: Vectors, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        taken.append(ids)
        return take(vectors, ids)

    monkeypatch.setattr(Vectors, "take", note)
    return taken


def test_lists_are_found_over_a_sample_that_the_seed_draws(tmp_path: Path, samples: list[NDArray[np.int64]]) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        IVFDense.build(some(), tmp_path / name, lists=6, sample=5, seed=seed)
    one, again, other = (sample.tolist() for sample in samples)
    assert one == again != other
    for sample in (one, other):
        assert len({*sample}) == 6 * 5
        assert sample == sorted(sample), "read from the disk in order"
        assert max(sample) > 600, "from everywhere"


def test_a_sample_of_more_than_there_are_is_all(
    tmp_path: Path, samples: list[NDArray[np.int64]], capfd: pytest.CaptureFixture[str]
) -> None:
    IVFDense.build(some()[:300], tmp_path / "index", lists=20, sample=100)
    assert samples[0].tolist() == list(range(300))
    assert capfd.readouterr() == ("", ""), "that vectors are few a list is known, and nothing to warn of"


def test_a_build_takes_as_many_threads_as_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    told: list[int] = []
    monkeypatch.setattr(faiss, "omp_set_num_threads", told.append)
    IVFDense.build(some(), tmp_path / "index", lists=4, threads=3)
    assert told == [3]


def test_a_file_that_could_not_be_written_whole_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    path = tmp_path / "index"
    path.write_text("the one before")

    def fill_the_disk(index: Any, name: str) -> None:
        Path(name).write_text("half")
        raise RuntimeError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", fill_the_disk)
        with pytest.raises(BadKnowledge, match=r"index: cannot be written \(no space left\)"):
            IVFDense.build(some(), path, lists=4)
    assert path.read_text() == "the one before"
    IVFDense.build(some(), path, lists=4)
    assert os.listdir(tmp_path) == ["index"]
    assert faiss.read_index(str(path)).ntotal == 1200
