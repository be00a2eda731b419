"""Tests of repository rules: file sizes, imports, version, no machine paths."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

import flmoe_kernels
from flmoe_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500
# Pinned versions, the licence text and measured results are data and may be longer.
DATA = {".csv", ".json", ".txt", ".png", ".svg", ".npz", ".safetensors"}
DATA_NAMES = {"LICENSE"}


def repository_files() -> list[Path]:
    """Files that git tracks or would track, without deleted files."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so the repository's files are unknown")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file()]


def text_files() -> list[tuple[str, str]]:
    found = []
    for path in repository_files():
        try:
            found.append((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    assert found
    return found


def test_files_are_short_enough_to_read() -> None:
    too_long = {}
    for name, text in text_files():
        path = Path(name)
        if path.suffix in DATA or path.name in DATA_NAMES:
            continue
        lines = text.count("\n")
        if lines > MAX_LINES:
            too_long[name] = lines
    assert not too_long, f"over {MAX_LINES} lines: {too_long}"


# A package may import itself and later packages; cli and integrations, profile and explain are on the same level.
RANKS = {
    **{"cli": 0, "integrations": 0, "profile": 1, "explain": 1, "published": 2, "layers": 3},
    **{"ops": 4, "core": 5, "_version": 6, "_native": 6},
}


def imported_modules(path: Path, package: str) -> set[str]:
    """Modules of this package that a file imports, including imports in functions but not under TYPE_CHECKING."""
    nodes, names = [ast.parse(path.read_text(encoding="utf-8"))], set[str]()
    while nodes:
        node = nodes.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                start = ".".join([*parents * bool(node.level), *filter(None, [node.module])])
                names |= {start} | {f"{start}.{alias.name}" for alias in node.names}
        nodes.extend(ast.iter_child_nodes(node))
    return {name for name in names if name.startswith("flmoe_kernels")}


def test_imports_have_one_direction_and_no_cycles() -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "flmoe_kernels").rglob("*.py")
    }
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = imported_modules(path, package) & set(files) - {name}
        # Importing a.b.c runs a and a.b, but c does not depend on them.
        graph[name] = {m for m in found if not name.startswith(f"{m}.")}
    outward = [
        (name, target)
        for name, targets in graph.items()
        for target in targets
        if "." in name
        and "." in target
        and RANKS.get(target.split(".")[1], 9) < RANKS.get(name.split(".")[1], -1)
    ]
    assert not outward, f"imports against the direction: {outward}"
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_paths_of_a_machine() -> None:
    # Assembled at run time, so that this file does not contain the paths.
    folders = "|".join(("wo" + "rk", "ro" + "ot", "ho" + r"me/\w+"))
    pattern = re.compile(rf"(?<![\w.\-/}})])/(?:{folders})(?:/|\b)(?![\w-])")
    found = {
        f"{name}:{number}": line.strip()
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    }
    assert not found, f"paths of a machine: {found}"


def test_one_version_source() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dynamic = \[.*"version".*\]$', pyproject, re.MULTILINE)
    assert "flmoe_kernels._version.__version__" in pyproject
    version_here = re.compile(re.escape(__version__) + r"\b")
    for name in ("setup.py", "CMakeLists.txt", "Makefile", "flmoe_kernels/__init__.py"):
        assert not version_here.search((ROOT / name).read_text()), f"{name} has a version"
    assert not re.search(r"^version\s*=\s*[\"']", pyproject, re.MULTILINE)
    assert flmoe_kernels.__version__ == __version__


def test_every_requirement_is_pinned() -> None:
    marker = r'[a-z_]+ [<>=]+ "[\w.]+"'
    pin = re.compile(rf"[a-z0-9-]+==[\w.+]+(; {marker}( and {marker})*)?|-r (demo|dev)\.txt")
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert len(files) == 4
    for file in files:
        for line in file.read_text().splitlines():
            requirement = line.split("#")[0].strip()
            assert not requirement or pin.fullmatch(requirement), requirement
