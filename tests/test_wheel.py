"""What is installed: the modules of the three folders, and nothing else."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "stages", "retrievers")


def checkout(into: Path) -> None:
    """Copy what git has or would add, so that a stale build/ can neither hide nor add a module."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know which files belong to the project")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, into / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a clean copy, with the setuptools at hand and no network."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout(folder / "source")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_three_folders_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"ralmspec/{folder}/{path.name}"
        for folder in FOLDERS
        for path in (ROOT / folder).iterdir()
        if path.suffix == ".py" or path.name == "py.typed"
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - about == expected
    assert {f"ralmspec/{folder}/py.typed" for folder in FOLDERS} <= names


def test_wheel_carries_licence_command_and_light_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = {
            name.split("/", 1)[1]: archive.read(name).decode() for name in archive.namelist() if "dist-info" in name
        }
    assert about["licenses/LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "ralmspec = ralmspec.pipeline.cli:app" in about["entry_points.txt"]
    metadata = Parser().parsestr(about["METADATA"])
    always = {
        re.split(r"[<>=!~ ;\[]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    assert always == {"anyio", "numpy", "pydantic", "rich", "typer"}
