# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Datastores: one entry a token, the same bytes however often the build is killed, refused when anything is wrong."""

import filecmp
import gzip
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ralmspec.pipeline import BadKnowledge
from ralmspec.retrievers.base import Query
from ralmspec.retrievers.datastore import Datastore
from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore, text_tokens
from ralmspec.retrievers.index import SearchOptions
from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import BuildOptions
from ralmspec.retrievers.manifest import Manifest
from ralmspec.retrievers.windows import Windows

pytest.importorskip("faiss", reason="needs ralmspec[local]")

DEMO = Path(__file__).parent.parent / "examples" / "demo"
KINDS = ("exact", "hnsw", "ivf")


class Bytes:
    """A model whose tokens are bytes, and whose key after a token follows from all tokens before it in the row."""

    name = "bytes"
    key_dimension = 8
    context_length = 32
    vocabulary = 256
    start_tokens: tuple[int, ...] = (0,)

    def __init__(self) -> None:
        self.calls = 0
        self.scale = 1.0

    def fingerprint(self) -> str:
        return "ab" * 32

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def keys(self, tokens):
        self.calls += 1
        assert tokens.shape[1] <= self.context_length and (tokens[:, 0] == 0).all()
        turned = np.cumsum(np.sin(tokens[..., np.newaxis] * np.arange(1.0, 9.0)), axis=1)
        return (self.scale * turned / np.arange(1.0, tokens.shape[1] + 1)[:, np.newaxis]).astype(np.float32)


class Stop(Exception):
    pass


def stopping(part: str, calls: int):
    """Raises at this call for this part."""

    def tell(name: str, done: int, total: int) -> None:
        nonlocal calls
        calls -= name == part
        if calls == 0 and name == part:
            raise Stop

    return tell


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} of a text\n\n" for n in range(60)))
    return path


OPTIONS = DatastoreOptions(window=20, context=6, batch=3)


# Windows


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 33, 34, 35, 400])
@pytest.mark.parametrize(("window", "context", "start"), [(20, 6, (9,)), (20, 0, ()), (20, 18, (9,)), (2, 1, ())])
def test_every_position_belongs_to_the_first_window_that_shows_it_enough(count, window, context, start):
    tokens = np.arange(100, 100 + count, dtype=np.int32)
    windows = Windows(tokens, window=window, context=context, start=start)
    own, stride = window - len(start), window - len(start) - context
    seen = []
    for first, stop in itertools.pairwise([*range(0, len(windows), 3), len(windows)]):
        rows = windows.rows(first, stop)
        assert rows.dtype == np.int64 and rows.shape == (stop - first, min(own, count) + len(start))
        assert (rows[:, : len(start)] == start).all()
        owned = windows.owned(rows, first)
        assert len(owned) == windows.begins(stop) - windows.begins(first)
        for at, token in enumerate(owned.tolist(), windows.begins(first)):
            assert token == tokens[at]
            window_of = first + next(i for i in range(stop - first) if windows.begins(first + i + 1) > at)
            before = at - window_of * stride
            assert before >= context or window_of == 0
            assert window_of == 0 or at - (window_of - 1) * stride >= own, "no earlier window shows it"
        seen += owned.tolist()
    assert seen == tokens.tolist()


def test_windows_that_stand_still_are_refused():
    tokens = np.arange(5)
    for window, context, start in ((8, 8, ()), (8, 7, (1,)), (8, -1, ())):
        with pytest.raises(ValueError, match=f"window of 8 tokens.*{context} of them as context"):
            Windows(tokens, window=window, context=context, start=start)
    assert Windows(tokens, window=1024).facts == {"window": 1024, "context": 256}
    assert Windows(tokens, window=64, start=(1,)).facts == {"window": 64, "context": 16}


# What is built


def test_an_entry_for_every_token_but_the_first(text, tmp_path):
    model = Bytes()
    made = build_datastore([text], tmp_path / "store", model, OPTIONS)
    read = np.frombuffer(text.read_bytes(), np.uint8)
    store = Datastore.open(tmp_path / "store")
    assert made.documents == len(store) == len(read) - 1
    np.testing.assert_array_equal(store.tokens, read)
    assert store.tokens.dtype == np.int32 and store.keys.kind == "float16" and store.keys.metric == "squared L2"
    windows = Windows(read[:-1], window=20, context=6, start=(0,))
    every = [windows.owned(model.keys(windows.rows(i, i + 1)), i) for i in range(len(windows))]
    np.testing.assert_array_equal(store.keys.stored, np.concatenate(every).astype(np.float16))
    assert made.encoder is not None and made.encoder.fingerprint == store.fingerprint == "ab" * 32
    assert made.parts["keys"] == {"storage": "float16", "window": 20, "context": 6, "batch": 3}
    assert made.parts["tokens"] == {"count": len(store), "vocabulary": 256, "texts": ["text.txt"]}
    assert {path.relative_to(tmp_path / "store").as_posix() for path in (tmp_path / "store").rglob("*.*")} == {
        *made.files,
        "manifest.json",
    }, "nothing is left lying about"


def test_texts_follow_one_another_and_every_line_ends_with_a_line_feed(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt.gz"
    one.write_bytes(b"first\r\n\r\nno end")
    two.write_bytes(gzip.compress("zweite äöü\n".encode()))
    build_datastore([one, two], tmp_path / "store", Bytes(), OPTIONS)
    assert bytes(Datastore.open(tmp_path / "store").tokens.tolist()) == "first\n\nno end\nzweite äöü\n".encode()
    build_datastore([one, two], tmp_path / "cut", Bytes(), DatastoreOptions(window=20, max_entries=8))
    assert bytes(Datastore.open(tmp_path / "cut").tokens.tolist()) == b"first\n\nno"
    build_datastore([one], tmp_path / "least", Bytes(), DatastoreOptions(max_entries=1))
    assert len(Datastore.open(tmp_path / "least")) == 1


def test_long_texts_are_read_in_pieces_of_whole_lines(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{n} {'x' * (n % 700)}\n" for n in range(1000)))
    pieces = list(text_tokens([path], Bytes()))
    assert len(pieces) > 3 and all(1 << 16 <= len(piece) < (1 << 16) + 1000 for piece in pieces[:-1])
    assert all(piece[-1] == ord("\n") and piece.dtype == np.int32 for piece in pieces)
    assert bytes(np.concatenate(pieces).astype(np.uint8)) == path.read_bytes()


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_keys_are_kept_as_asked(text, tmp_path, storage):
    build_datastore([text], tmp_path / "store", Bytes(), DatastoreOptions(window=20, storage=storage))
    store = Datastore.open(tmp_path / "store")
    assert store.keys.kind == storage
    exact = Bytes().keys(np.array([[0, *store.tokens[:10]]]))[0, 1:]
    np.testing.assert_allclose(store.keys.take(np.arange(10)), exact, rtol=0 if storage == "float32" else 2**-8)


# Interruptions


@pytest.mark.parametrize(("part", "calls"), [("tokens", 1), ("keys", 1), ("keys", 7), ("keys", 29), ("checksums", 2)])
def test_an_interrupted_build_goes_on_behind_its_last_pass(text, tmp_path, part, calls):
    whole, model = Bytes(), Bytes()
    reference = build_datastore([text], tmp_path / "whole", whole, OPTIONS)
    assert whole.calls == 29
    with pytest.raises(Stop):
        build_datastore([text], tmp_path / "store", model, OPTIONS, tell=stopping(part, calls))
    assert not (tmp_path / "store").exists()
    done, model.calls = model.calls, 0
    assert done == (calls if part == "keys" else 29 if part == "checksums" else 0)
    made = build_datastore([text], tmp_path / "store", model, OPTIONS)
    # Those that were there are not made again, but for the last, which shows that the model is still the same.
    assert model.calls == (0 if part == "checksums" else 29 - done + (done > 0))
    assert (made.files, made.parts) == (reference.files, reference.parts)
    assert not (tmp_path / "store.building").exists()


def test_a_model_that_now_gives_other_keys_does_not_go_on(text, tmp_path):
    model = Bytes()
    with pytest.raises(Stop):
        build_datastore([text], tmp_path / "store", model, OPTIONS, tell=stopping("keys", 5))
    model.scale = 1.01
    with pytest.raises(BadKnowledge, match=r"keys\.npy: was begun with keys that bytes does not give now"):
        build_datastore([text], tmp_path / "store", model, OPTIONS)
    model.scale, model.calls = 1.0, 0
    build_datastore([text], tmp_path / "store", model, OPTIONS)
    assert model.calls == 25, "nothing was lost"


def test_an_unfinished_build_with_other_options_texts_or_model_is_not_mixed_in(text, tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(Stop):
        build_datastore([text], folder, Bytes(), OPTIONS, tell=stopping("keys", 2))
    for name, value in (("window", 21), ("context", 7), ("batch", 2), ("max_entries", 9), ("storage", "float32")):
        other = replace(OPTIONS, **{name: value})  # type: ignore[arg-type]
        with pytest.raises(BadKnowledge, match=f"unfinished build with other {name}"):
            build_datastore([text], folder, Bytes(), other)
    model = Bytes()
    model.fingerprint = lambda: "cd" * 32  # type: ignore[method-assign]
    with pytest.raises(BadKnowledge, match="unfinished build with other model"):
        build_datastore([text], folder, model, OPTIONS)
    (tmp_path / "more.txt").write_text("more")
    with pytest.raises(BadKnowledge, match="unfinished build with other sources"):
        build_datastore([text, tmp_path / "more.txt"], folder, Bytes(), OPTIONS)
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "alpha"}\n')
    with pytest.raises(BadKnowledge, match="holds an unfinished datastore"):
        build_index(passages, folder, BuildOptions(kinds=("bm25",)))
    build_datastore([text], folder, Bytes(), OPTIONS)


def test_two_builds_in_one_folder_are_refused(text, tmp_path):
    refused: list[object] = []

    def build_too(part, done, total):
        if not refused:
            with pytest.raises(BadKnowledge, match="another build is running") as error:
                build_datastore([text], tmp_path / "store", Bytes(), OPTIONS)
            refused.append(error)

    build_datastore([text], tmp_path / "store", Bytes(), OPTIONS, tell=build_too)
    assert refused


def test_a_damaged_note_of_what_is_done_is_named(text, tmp_path):
    with pytest.raises(Stop):
        build_datastore([text], tmp_path / "store", Bytes(), OPTIONS, tell=stopping("keys", 2))
    (tmp_path / "store.building" / "keys.part" / "done").write_text("")
    with pytest.raises(BadKnowledge, match=r"keys\.part/done: is damaged"):
        build_datastore([text], tmp_path / "store", Bytes(), OPTIONS)


# What cannot be built


def test_texts_that_cannot_be_are_named(tmp_path):
    cases = {
        "none.txt": (None, "no such file"),
        "empty.txt": (b"", "is empty"),
        "short.txt": (b"\n", "1 tokens in all; a datastore takes at least 2"),
        "latin.txt": ("eins\nzwölf\n".encode("latin-1"), r"latin\.txt, line 2: is no text in UTF-8"),
        "broken.txt.gz": (gzip.compress(b"alpha beta\n" * 500)[:-20], "cannot be unpacked"),
        "plain.txt.gz": (b"alpha beta\n" * 500, "cannot be unpacked"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadKnowledge, match=message) as error:
            build_datastore([path], tmp_path / f"store of {name}", Bytes(), OPTIONS)
        assert str(path) in str(error.value)
        assert not (tmp_path / f"store of {name}").exists()


def test_no_texts_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="texts: none given"):
        build_datastore([], tmp_path / "store", Bytes(), OPTIONS)


def test_a_folder_that_exists_is_not_touched(text, tmp_path):
    (tmp_path / "store").mkdir()
    with pytest.raises(BadKnowledge, match="exists already"):
        build_datastore([text], tmp_path / "store", Bytes(), OPTIONS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kinds": ("exact", "bm25")}, "kinds: bm25; a datastore can have exact, hnsw, ivf"),
        ({"kinds": ()}, "kinds: none given"),
        ({"storage": "int8"}, "storage: 'int8'"),
        ({"window": 0}, "window: 0; it must be at least 1"),
        ({"context": -1}, "context: -1; it must be at least 0"),
        ({"batch": 0}, "batch: 0; it must be at least 1"),
        ({"max_entries": 0}, "max_entries: 0; it must be at least 1"),
    ],
)
def test_unknown_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DatastoreOptions(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 33}, "window: 33 tokens, but bytes takes at most 32"),
        ({"window": 20, "context": 20}, "cannot keep 20 of them as context"),
        ({"window": 20, "context": 19}, "1 of them the model's own, cannot keep 19"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_anything_is_done(text, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        build_datastore([text], tmp_path / "store", Bytes(), DatastoreOptions(**options))
    assert list(tmp_path.iterdir()) == [text]


def test_a_window_that_is_not_given_fits_the_model(text, tmp_path):
    made = build_datastore([text], tmp_path / "store", Bytes(), DatastoreOptions())
    assert (made.parts["keys"]["window"], made.parts["keys"]["context"]) == (32, 8)


def test_a_model_without_keys_and_a_tokenizer_of_another_are_refused(text, tmp_path):
    class Plain:
        name = "plain"

    with pytest.raises(BadKnowledge, match=r"the model \(Plain\) has no keys, key_dimension, fingerprint"):
        build_datastore([text], tmp_path / "store", Plain(), OPTIONS)  # type: ignore[arg-type]
    for token in (256, -1, 2**31, 2**70):
        model = Bytes()
        model.encode = partial(lambda token, text: [5, token], token)  # type: ignore[method-assign]
        with pytest.raises(BadKnowledge, match=r"text\.txt, from line 1 on: .*the model knows 0 to 255"):
            build_datastore([text], tmp_path / "store", model, OPTIONS)


@pytest.mark.parametrize(
    ("storage", "scale", "remedy"),
    [("float16", 1e6, "float16 cannot hold; keep keys as float32"), ("float32", np.nan, "float32 cannot hold; check")],
)
def test_keys_that_cannot_be_kept_are_refused_and_nothing_is_lost(text, tmp_path, storage, scale, remedy):
    model, options = Bytes(), DatastoreOptions(window=20, context=6, storage=storage)
    with pytest.raises(Stop):
        build_datastore([text], tmp_path / "store", model, options, tell=stopping("keys", 3))
    whole = model.keys

    def spoiling(tokens):
        return whole(tokens) * np.float32(scale if model.calls >= 4 else 1)

    model.keys = spoiling  # type: ignore[method-assign]
    with pytest.raises(BadKnowledge, match=rf"keys from entry \d+ on: row \d+ has a number that {remedy}"):
        build_datastore([text], tmp_path / "store", model, options)
    model.keys = whole  # type: ignore[method-assign]
    build_datastore([text], tmp_path / "store", model, options)


def test_keys_of_another_shape_are_refused(text, tmp_path):
    model = Bytes()
    model.keys = lambda tokens: np.zeros((*tokens.shape, 7), np.float32)  # type: ignore[method-assign]
    with pytest.raises(BadKnowledge, match=r"gave keys of shape \[3, 20, 7\] for \[3, 20\] tokens"):
        build_datastore([text], tmp_path / "store", model, OPTIONS)


# With a real model


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny LLaMA, a text, and their datastore with every kind: (model's folder, text, datastore)."""
    pytest.importorskip("torch", reason="needs ralmspec[local]")
    from tiny_models import tiny_model

    from ralmspec.stages.transformers_model import TransformersModel

    folder = tmp_path_factory.mktemp("real")
    with gzip.open(DEMO / "passages_wikipedia.jsonl.gz", "rt") as lines:
        passages = [json.loads(line)["text"] for line in itertools.islice(lines, 6)]
    (folder / "text.txt").write_text("\n".join(passages))
    path = tiny_model("llama", folder)
    options = DatastoreOptions(kinds=KINDS, window=64, context=20, batch=3, ivf_lists=8)
    build_datastore([folder / "text.txt"], folder / "store", TransformersModel.load(path), options)
    return path, folder / "text.txt", folder / "store"


def test_keys_are_those_of_the_models_own_frontiers(real):
    from ralmspec.stages.model import Prefix, read_to_end
    from ralmspec.stages.transformers_model import TransformersModel

    path, text, folder = real
    model = TransformersModel.load(path)
    store = Datastore.open(folder, decode=model.decode)
    assert store.fingerprint == model.fingerprint() and store.vocabulary == model.vocabulary
    assert model.decode(store.tokens.tolist()) == text.read_text() + "\n"
    assert len(store) > 1500
    exact, (start,) = store.retriever(), model.start_tokens
    stride = 64 - 1 - 20
    for entry in (0, 1, 62, 63, 64, 200, 201, len(store) - 1):
        window = max(0, (entry - 20) // stride) if entry >= 63 else 0
        prefix = np.array([start, *store.tokens[window * stride : entry + 1]])
        frontier = read_to_end(model, Prefix(session=1, tokens=prefix))
        assert frontier.key is not None
        np.testing.assert_allclose(store.keys.take(np.array([entry]))[0], frontier.key, rtol=2**-10, atol=1e-4)
        (query,) = exact.encode([Query(text="", vector=frontier.key)])
        assert exact.search([query], 1)[0].ids.tolist() == [entry]
        assert store.values[entry] == store.tokens[entry + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_by_squared_distance(real, kind):
    store = Datastore.open(real[2])
    retriever = store.retriever(kind, SearchOptions(ef_search=64, probes=8))
    assert len(retriever) == len(store)
    keys = store.keys.block(0, len(store))
    ids = np.arange(0, len(store), 97)
    queries = retriever.encode([Query(text="", vector=key + np.float32(0.01)) for key in keys[ids]])
    for id, query, ranking in zip(ids, queries, retriever.search(queries, 10), strict=True):
        assert query.vector is not None
        assert ranking.ids[0] == id and (ranking.scores <= 0).all() and len(ranking.ids) == 10
        assert retriever.score(query, retriever.rows(ranking.ids)).tolist() == ranking.scores.tolist()
        distances = ((keys[ranking.ids].astype(np.float64) - query.vector) ** 2).sum(axis=1)
        np.testing.assert_allclose(-ranking.scores, distances, rtol=1e-5)


def test_a_build_that_is_killed_again_and_again_gives_the_same_bytes(real, tmp_path):
    path, text, built = real
    folder, program = tmp_path / "store", Path(__file__).with_name("killed_builds.py")
    arguments = ["datastore", str(text), str(folder), ",".join(KINDS), str(path), "0"]
    done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3, "it was killed"
    mine, reference = Manifest.read(folder, "datastore"), Manifest.read(built, "datastore")
    assert (mine.files, mine.parts, mine.encoder) == (reference.files, reference.parts, reference.encoder)
    for name in mine.files:
        assert filecmp.cmp(folder / name, built / name, shallow=False)
    assert not folder.with_name("store.building").exists()
