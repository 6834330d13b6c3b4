"""Imports point one way, no folder goes by its bare name, stages name no workload, heavy packages load where used."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("retrievers", "stages", "pipeline")  # each may import those before it
PROGRAMS = ("examples", "benchmarks", "tests")
HEAVY = frozenset({"torch", "transformers", "faiss", "sentence_transformers", "bm25s", "jnius", "pyserini"})
WORKLOADS = ("in_context", "incontext", "knn")
"""What a workload's name is known by; the files that are one begin so."""


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def modules(node: ast.AST) -> Iterator[str]:
    """The absolute modules that one statement imports; `from ralmspec import stages` gives `ralmspec.stages`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(tree: ast.AST) -> list[str]:
    return [module for node in ast.walk(tree) for module in modules(node)]


def upward(layer: str, tree: ast.AST) -> list[str]:
    """Imports of a layer that stands above, of a program, or out of the folder by dots."""
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    found = []
    for module in imported(tree):
        first, *rest = module.split(".")
        if first in PROGRAMS or (first == "ralmspec" and rest[:1] and rest[0] not in allowed):
            found.append(module)
    climbs = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 1)
    return found + ["." * node.level + (node.module or "") for node in climbs]


def bare(tree: ast.AST) -> list[str]:
    """Imports of a folder by its bare name, which would make a second copy of every class."""
    return [module for module in imported(tree) if module.split(".")[0] in LAYERS]


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in ast.unparse(test)


def heavy(node: ast.AST) -> Iterator[str]:
    """Heavy packages imported when the module is: anywhere but in functions and `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield from heavy(ast.Module([other], []))
            continue
        yield from (module for module in modules(child) if module.split(".")[0] in HEAVY)
        yield from heavy(child)


def workloads(tree: ast.Module) -> list[str]:
    """Names, attributes, imports and strings of the code that name a workload; docstrings may speak of them."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words = []
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                words.append(word)
            case ast.FunctionDef(name=word) | ast.AsyncFunctionDef(name=word) | ast.ClassDef(name=word):
                words.append(word)
            case ast.ImportFrom(module=module, names=names):
                words += [module or "", *(alias.name for alias in names)]
            case ast.Import(names=names):
                words += [alias.name for alias in names]
            case ast.keyword(arg=str(word)):
                words.append(word)
            case ast.Constant(value=str(word)) if id(node) not in prose:
                words.append(word)
    return [word for word in words if any(workload in word.lower() for workload in WORKLOADS)]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(*LAYERS), ids=name)
def test_imports_point_down(path: Path) -> None:
    assert upward(path.relative_to(ROOT).parts[0], parse(path)) == []


@pytest.mark.parametrize("path", sources(*LAYERS), ids=name)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert list(heavy(parse(path))) == []


@pytest.mark.parametrize("path", sources(*LAYERS, *PROGRAMS), ids=name)
def test_no_folder_is_imported_by_its_bare_name(path: Path) -> None:
    assert bare(parse(path)) == []


@pytest.mark.parametrize("path", sources("stages"), ids=name)
def test_nothing_but_a_workload_names_one(path: Path) -> None:
    """No stage, no message, no session has an `if` for the workload that it serves."""
    assert bool(workloads(parse(path))) == path.stem.startswith(WORKLOADS)


def test_nothing_below_the_public_names_needs_a_workload() -> None:
    """The runner and the arrangements get whichever is given; only its default and the commands name one."""
    for file in ("runner", "arrangements", "compare", "lossless", "audit", "threads", "watchdog", "output_path"):
        assert workloads(parse(ROOT / "pipeline" / f"{file}.py")) == [], file


@pytest.mark.parametrize("folder", LAYERS)
def test_folders_hold_modules_and_no_folders(folder: str) -> None:
    assert (ROOT / folder / "py.typed").exists()
    nested = [name(path) for path in sources(folder) if path.parent != ROOT / folder]
    assert nested == [], "a folder inside works in an editable install and is missing from the wheel"


def test_importing_every_module_loads_nothing_heavy() -> None:
    names = []
    for path in sources(*LAYERS):
        folder = f"ralmspec.{path.parent.name}"
        names.append(folder if path.stem == "__init__" else f"{folder}.{path.stem}")
    assert names
    program = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted({module.split('.')[0] for module in sys.modules})))\n"
    )
    command = [sys.executable, "-P", "-c", program, json.dumps(sorted(names))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(json.loads(done.stdout)) == frozenset()


@pytest.mark.parametrize(
    ("layer", "line", "found"),
    [
        ("retrievers", "from ralmspec.stages.model import Prefix", ["ralmspec.stages.model.Prefix"]),
        ("retrievers", "import ralmspec.pipeline", ["ralmspec.pipeline"]),
        ("stages", "from ralmspec import pipeline", ["ralmspec.pipeline"]),
        ("stages", "def f():\n    from ralmspec.pipeline import Pipeline", ["ralmspec.pipeline.Pipeline"]),
        ("pipeline", "from tests.fakes import Model", ["tests.fakes.Model"]),
        ("pipeline", "from ..stages import Lookup", ["..stages"]),
        ("stages", "from ralmspec.retrievers.base import Query\nfrom .stage import Stage", []),
        ("pipeline", "from ralmspec.stages.stage import Stage\nimport asyncio", []),
    ],
)
def test_the_check_sees_an_upward_import(layer: str, line: str, found: list[str]) -> None:
    assert upward(layer, ast.parse(line)) == found


def test_the_check_sees_a_bare_import() -> None:
    assert bare(ast.parse("import pipeline")) == ["pipeline"]
    assert bare(ast.parse("def f():\n    from stages.verify import Verify")) == ["stages.verify.Verify"]
    assert bare(ast.parse("import ralmspec.pipeline\nfrom .pipeline import Pipeline")) == []


def test_the_check_sees_a_heavy_import() -> None:
    assert list(heavy(ast.parse("import torch.nn"))) == ["torch.nn"]
    assert list(heavy(ast.parse("try:\n    import faiss\nexcept ImportError:\n    pass"))) == ["faiss"]
    assert list(heavy(ast.parse("class C:\n    from transformers import Cache"))) == ["transformers.Cache"]
    assert list(heavy(ast.parse("if TYPE_CHECKING:\n    import torch\nelse:\n    import faiss"))) == ["faiss"]
    assert list(heavy(ast.parse("def f():\n    import torch"))) == []


def test_the_check_sees_a_named_workload() -> None:
    assert workloads(ast.parse("from .in_context import prompt")) == ["in_context"]
    assert workloads(ast.parse("if isinstance(w, InContext): pass")) == ["InContext"]
    assert workloads(ast.parse("if workload.kind == 'knn_lm': pass")) == ["knn_lm"]
    assert workloads(ast.parse('def f():\n    """Under KNN-LM a step is one token."""')) == []
