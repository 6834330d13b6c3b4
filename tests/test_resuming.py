"""Inside an index build: what an interrupted one keeps, to the passage, and that every option reaches its part.

Encoder and kinds are stand-ins here, so that it is seen what they are asked; test_index_build.py builds real ones.
"""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ralmspec.pipeline import BadKnowledge, Document
from ralmspec.retrievers import encoder
from ralmspec.retrievers.bm25 import BM25
from ralmspec.retrievers.hnsw import HNSWDense
from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import BuildOptions
from ralmspec.retrievers.ivf import IVFDense
from ralmspec.retrievers.lucene import Lucene
from ralmspec.retrievers.manifest import EncoderFacts, Manifest

for package in ("filelock", "bm25s"):
    pytest.importorskip(package, reason="needs ralmspec[local]")

BLOCK = 1024  # passages are encoded so many at a time
COUNT = 2 * BLOCK + 300


class Encoder:
    """A passage's vector is its number, and who encoded it; every passage that it is asked for is noted."""

    name, dimension = "stand-in", 2

    def __init__(self, who: int = 1) -> None:
        self.who = who
        self.asked: list[int] = []

    def fingerprint(self) -> str:
        return "ab" * 32

    def passage_fingerprint(self) -> str:
        return f"passages {self.who}"

    def encode_passages(self, passages: Sequence[Document]) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.asked += [passage.id for passage in passages]
        return np.array([[passage.id, self.who] for passage in passages], dtype=np.float32)


class Stop(Exception):
    """The build is interrupted."""


def stop_at(part: str, done: int) -> Callable[[str, int, int], None]:
    def tell(what: str, so_far: int, total: int) -> None:
        if (what, so_far) == (part, done):
            raise Stop

    return tell


def use(monkeypatch: pytest.MonkeyPatch, made: Encoder) -> Encoder:
    monkeypatch.setattr(encoder, "open_encoder", lambda name, device: made)
    monkeypatch.setattr(encoder, "open_passage_encoder", lambda name, device: made)
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps({"text": f"word{row} of a passage"}) + "\n" for row in range(COUNT)))
    return path


def vectors(folder: Path) -> Any:
    return np.load(folder / "vectors" / "vectors.npy")


# What is kept ------------------------------------------------------------------------------------------------------


def test_vectors_go_on_behind_the_last_block_that_was_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = use(monkeypatch, Encoder()), Encoder()
    with pytest.raises(Stop):
        build_index(source, tmp_path / "index", BuildOptions(), tell=stop_at("vectors", BLOCK))
    assert first.asked == list(range(BLOCK))
    use(monkeypatch, second)
    build_index(source, tmp_path / "index", BuildOptions())
    assert second.asked == list(range(BLOCK, COUNT)), "each passage is encoded once"
    assert vectors(tmp_path / "index").tolist() == [[row, 1] for row in range(COUNT)]


def test_vectors_of_an_encoder_that_has_changed_meanwhile_begin_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Encoder(who=1))
    with pytest.raises(Stop):
        build_index(source, tmp_path / "index", BuildOptions(), tell=stop_at("vectors", 2 * BLOCK))
    use(monkeypatch, Encoder(who=2))
    build_index(source, tmp_path / "index", BuildOptions())
    assert vectors(tmp_path / "index").tolist() == [[row, 2] for row in range(COUNT)], "no mixture of two encoders"


def test_a_graph_finds_what_it_left_and_lists_begin_in_an_empty_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Encoder())
    found: list[list[str]] = []

    def build(vectors: Any, path: Path, **options: Any) -> None:
        found.append(sorted(one.name for one in path.parent.iterdir()))
        path.with_name("left").write_text("half")
        if len(found) in (1, 3):
            raise Stop
        path.with_name("left").rename(path)

    monkeypatch.setattr(HNSWDense, "build", build)
    monkeypatch.setattr(IVFDense, "build", build)
    for _ in range(2):
        with pytest.raises(Stop):
            build_index(source, tmp_path / "index", BuildOptions(kinds=("hnsw", "ivf")))
    build_index(source, tmp_path / "index", BuildOptions(kinds=("hnsw", "ivf")))
    assert found == [[], ["left"], [], []]
    Manifest.read(tmp_path / "index").check(tmp_path / "index", ["hnsw", "ivf"])


def test_a_finished_build_that_was_not_published_is_not_taken_for_another(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed after its manifest was written, before the last move."""
    folder, options = tmp_path / "index", BuildOptions(kinds=("bm25",))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Manifest, "read", lambda *arguments: (_ for _ in ()).throw(Stop))
        build_index(source, folder, options)
    assert (tmp_path / "index.building" / "manifest.json").exists() and not folder.exists()
    with pytest.raises(BadKnowledge, match="unfinished build with other seed"):
        build_index(source, folder, BuildOptions(kinds=("bm25",), seed=5))
    told: list[str] = []
    build_index(source, folder, options, tell=lambda part, done, total: told.append(part))
    assert told == [], "nothing is built again"
    assert {path.name for path in folder.iterdir()} == {"passages", "bm25", "manifest.json"}


@pytest.mark.parametrize("part", ["passages", "bm25"])
def test_a_build_goes_on_that_was_killed_as_a_part_got_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """From that moment on the part counts as finished, so all that is to be known of it is on the disk already."""
    rename = Path.rename

    def rename_and_die(path: Path, target: Path) -> Path:
        rename(path, target)
        if target.name == part:
            raise Stop
        return target

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "rename", rename_and_die)
        build_index(source, tmp_path / "index", BuildOptions(kinds=("bm25",)))
    told: list[str] = []
    build_index(
        source, tmp_path / "index", BuildOptions(kinds=("bm25",)), tell=lambda part, done, total: told.append(part)
    )
    assert part not in told
    assert Manifest.read(tmp_path / "index").parts["passages"]["count"] == COUNT


def test_a_manifest_is_there_whole_or_not_at_all(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it a folder counts as complete, so half of one would be the end of the build."""
    write = Path.write_bytes

    def write_half_and_die(path: Path, content: bytes) -> int:
        write(path, content[: len(content) // 2])
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "write_bytes", write_half_and_die)
        build_index(source, tmp_path / "index", BuildOptions(kinds=("bm25",)))
    build_index(source, tmp_path / "index", BuildOptions(kinds=("bm25",)))
    Manifest.read(tmp_path / "index").check(tmp_path / "index", ["passages", "bm25"])


def test_other_embeddings_are_not_mixed_in(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Encoder())
    given = tmp_path / "given.npy"
    np.save(given, np.ones((COUNT, 2), np.float32))
    options = BuildOptions(embeddings=given)
    with pytest.raises(Stop):
        build_index(source, tmp_path / "index", options, tell=stop_at("vectors", BLOCK))
    np.save(given, np.zeros((COUNT, 2), np.float32))
    with pytest.raises(BadKnowledge, match="unfinished build with other embeddings"):
        build_index(source, tmp_path / "index", options)


# What reaches what -------------------------------------------------------------------------------------------------


def test_every_option_reaches_its_part_and_the_manifest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Encoder())
    given: dict[str, dict[str, Any]] = {}

    def builder(kind: str) -> Callable[..., None]:
        def build(content: Any, path: Path, *, tell: Any, **options: Any) -> None:
            given[kind] = {**options, "of": len(content)}
            tell(0, 1)
            (path / "file" if path.is_dir() else path).write_text(kind)

        return build

    for kind, owner in {"hnsw": HNSWDense, "ivf": IVFDense, "bm25": BM25, "lucene": Lucene}.items():
        monkeypatch.setattr(owner, "build", builder(kind))
    options = BuildOptions(
        kinds=("exact", "hnsw", "ivf", "bm25", "lucene"), threads=3, hnsw_m=7, hnsw_ef_construction=33, ivf_lists=9,
        lucene_heap_mb=99, seed=5, storage="float16",
    )  # fmt: skip
    told: list[str] = []
    manifest = build_index(source, tmp_path / "index", options, tell=lambda part, done, total: told.append(part))
    assert given == {
        "hnsw": {"of": COUNT, "m": 7, "ef_construction": 33, "seed": 5, "threads": 3},
        "ivf": {"of": COUNT, "lists": 9, "seed": 5, "threads": 3},
        "bm25": {"of": COUNT, "k1": 0.9, "b": 0.4, "total": COUNT},
        "lucene": {"of": COUNT, "heap_mb": 99, "total": COUNT},
    }
    assert [*dict.fromkeys(told)] == ["passages", "vectors", "hnsw", "ivf", "bm25", "lucene", "checksums"]
    assert sorted(manifest.kinds) == ["bm25", "exact", "hnsw", "ivf", "lucene"]
    assert manifest.parts == {
        "passages": {"count": COUNT, "source": "passages.jsonl"},
        "vectors": {"storage": "float16", "source": "encoded here"},
        "hnsw": {"m": 7, "ef_construction": 33, "seed": 5},
        "ivf": {"lists": 9, "seed": 5},
        "bm25": {"k1": 0.9, "b": 0.4},
        "lucene": {"analyzer": "English"},
    }
    assert manifest.encoder == EncoderFacts(name="stand-in", dimension=2, fingerprint="ab" * 32)
    assert vectors(tmp_path / "index").dtype == np.float16
    assert [path.name for path in (tmp_path / "index" / "vectors").iterdir()] == ["vectors.npy"]


def test_lists_are_four_times_the_square_root_unless_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Encoder())
    monkeypatch.setattr(IVFDense, "build", lambda vectors, path, **options: path.write_text(str(options["lists"])))
    build_index(source, tmp_path / "index", BuildOptions(kinds=("ivf",)))
    assert (tmp_path / "index" / "ivf" / "lists.faiss").read_text() == str(round(4 * COUNT**0.5))


def test_checksums_tell_how_many_bytes_are_read(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    build_index(
        source,
        tmp_path / "index",
        BuildOptions(kinds=("bm25",)),
        tell=lambda part, done, total: told.append((done, total)) if part == "checksums" else None,
    )
    manifest = Manifest.read(tmp_path / "index")
    size = sum(facts.bytes for facts in manifest.files.values())
    assert {total for _, total in told} == {size}
    assert [done for done, _ in told] == sorted({done for done, _ in told} | {0, size})
    assert len(told) == len(manifest.files) + 1


# Passages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [COUNT - 1, COUNT + 1])
def test_embeddings_of_more_or_fewer_passages_are_refused_by_name(
    source: Path, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Encoder())
    np.save(tmp_path / "given.npy", np.ones((rows, 2), np.float32))
    with pytest.raises(BadKnowledge, match=rf"given\.npy.*{rows}"):
        build_index(source, tmp_path / "index", BuildOptions(embeddings=tmp_path / "given.npy"))


def test_an_archive_that_holds_nonsense_is_named(source: Path, tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(source.read_bytes()))
    packed[10] |= 0b110  # the first block's kind, behind a header of ten bytes, becomes one that there is not
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(packed)
    with pytest.raises(BadKnowledge, match=r"broken\.jsonl\.gz: cannot be unpacked \(Error -3"):
        build_index(broken, tmp_path / "index", BuildOptions(kinds=("bm25",)))
    assert not (tmp_path / "index").exists()


def test_letters_of_every_script_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "scripts.jsonl"
    path.write_text('{"title": "\\u03a9mega", "text": "na\\u00efve \\u6f22\\u5b57 \\ud83d\\ude00 word"}\n')
    build_index(path, tmp_path / "index", BuildOptions(kinds=("bm25",)))
    kept = (tmp_path / "index" / "passages" / "passages.jsonl").read_text(encoding="utf-8")
    assert kept == '{"id": 0, "title": "Ωmega", "text": "naïve 漢字 😀 word"}\n'
