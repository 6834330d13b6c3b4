"""The manifest: whatever is done to an index's files, it is noticed, and the file is named."""

import random
from pathlib import Path

import pytest

from ralmspec.pipeline import BadKnowledge
from ralmspec.retrievers.manifest import NAME, EncoderFacts, FileFacts, Manifest


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder with two parts and their manifest; what is in the files does not matter here."""
    generator = random.Random(0)
    for name in ("passages/passages.jsonl", "bm25/a.npy", "bm25/b.npy"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(generator.randbytes(500))
    files = {
        f"{part}/{path.name}": FileFacts.of(path, part)
        for part in ("passages", "bm25")
        for path in (tmp_path / part).iterdir()
    }
    Manifest(
        content="index",
        created="2026-01-02T03:04:05+00:00",
        documents=7,
        encoder=EncoderFacts(name="minilm", dimension=384, fingerprint="ab"),
        metric="inner product",
        parts={"passages": {"count": 7}, "bm25": {"k1": 0.9}},
        versions={"numpy": "2.4.6"},
        files=files,
    ).save(tmp_path)
    return tmp_path


def load(index: Path) -> Manifest:
    manifest = Manifest.read(index)
    manifest.check(index, manifest.parts)
    return manifest


def test_what_is_saved_is_read(index: Path) -> None:
    manifest = load(index)
    assert manifest.documents == 7 and manifest.kinds == ["bm25"] and manifest.parts["bm25"] == {"k1": 0.9}
    assert manifest.files["bm25/a.npy"].bytes == 500
    before = (index / NAME).read_bytes()
    manifest.save(index)
    assert (index / NAME).read_bytes() == before


def mutate(content: bytes, generator: random.Random) -> bytes:
    """One of the things that happen to files: a bit turned, bytes lost, added, zeroed, or moved."""
    at = generator.randrange(len(content))
    length = generator.randint(1, 40)
    kind = generator.randrange(6)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ (1 << generator.randrange(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + content[at + length :]
    if kind == 3:
        return content[:at] + generator.randbytes(length) + content[at:]
    if kind == 4:
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    return content[at:] + content[:at]


@pytest.mark.parametrize("name", [NAME, "passages/passages.jsonl", "bm25/b.npy"])
def test_every_mutated_file_is_refused_by_name(index: Path, name: str) -> None:
    generator = random.Random(1)
    path = index / name
    whole = path.read_bytes()
    for _ in range(200):
        mutated = mutate(whole, generator)
        if mutated == whole:
            continue
        path.write_bytes(mutated)
        with pytest.raises(BadKnowledge) as refused:
            load(index)
        assert str(path) in str(refused.value)
    path.write_bytes(whole)
    load(index)


def test_a_changed_fact_is_refused_though_the_json_is_fine(index: Path) -> None:
    path = index / NAME
    path.write_text(path.read_text().replace('"k1": 0.9', '"k1": 0.8'))
    with pytest.raises(BadKnowledge, match="checksum"):
        Manifest.read(index)


def test_a_missing_and_an_extra_file_are_named(index: Path) -> None:
    (index / "bm25" / "c.npy").write_bytes(b"x")
    with pytest.raises(BadKnowledge, match=r"c\.npy.*does not belong"):
        load(index)
    (index / "bm25" / "c.npy").unlink()
    (index / "bm25" / "a.npy").unlink()
    with pytest.raises(BadKnowledge, match=r"a\.npy.*missing"):
        load(index)


def test_only_the_parts_in_use_are_read(index: Path) -> None:
    (index / "bm25" / "a.npy").write_bytes(b"x")
    Manifest.read(index).check(index, {"passages"})


@pytest.mark.parametrize("folder", ["nowhere", "passages/passages.jsonl"])
def test_what_is_no_index_folder_is_refused(index: Path, folder: str) -> None:
    with pytest.raises(BadKnowledge, match="ralmspec index build"):
        Manifest.read(index / folder)


@pytest.mark.parametrize("folder", ["nowhere", "passages/passages.jsonl"])
def test_what_is_no_datastore_is_refused(index: Path, folder: str) -> None:
    with pytest.raises(BadKnowledge, match=r"no datastore of KNN-LM; make one with `ralmspec knn build`"):
        Manifest.read(index / folder, "datastore")


def test_an_index_is_not_taken_for_a_datastore_nor_a_datastore_for_an_index(index: Path) -> None:
    with pytest.raises(BadKnowledge, match="is an index folder, not a datastore of KNN-LM; .*`ralmspec index`"):
        Manifest.read(index, "datastore")
    Manifest.read(index).model_copy(update={"content": "datastore"}).save(index)
    assert Manifest.read(index, "datastore").documents == 7
    with pytest.raises(BadKnowledge, match="is a datastore of KNN-LM, not an index folder; .*`ralmspec knn`"):
        Manifest.read(index)


def test_files_of_another_version_are_refused(index: Path) -> None:
    path = index / NAME
    path.write_text(path.read_text().replace("ralmspec folder 1", "ralmspec folder 2"))
    with pytest.raises(BadKnowledge, match="version"):
        Manifest.read(index)
