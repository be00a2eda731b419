"""Tests of the README and docs: snippets, links, tables."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flmoe_kernels
from bench import table
from flmoe_kernels import (
    FusionTransformer,
    ReferenceInteractionMoE,
    explain,
)
from flmoe_kernels.core.backend import BACKENDS, CAPABILITIES
from tests.support import readme_table

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = [ROOT / "docs" / "tutorial.md", ROOT / "docs" / "own_model.md"]
BLOCKS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    if page not in TUTORIALS
    for number, text in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("text", BLOCKS)
def test_a_snippet_runs(text: str, tmp_path: Path) -> None:
    for library in re.findall(r"^import (transformers|lightning|accelerate)", text, re.MULTILINE):
        pytest.importorskip(library)
    file = tmp_path / "test_snippet.py"
    file.write_text(text)
    command = [sys.executable, str(file)]
    if "def test_" in text:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.name)
def test_a_tutorial_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    """The blocks of a tutorial are one script. Numbers, and notes on near-ties, depend on the machine."""
    script = "\n".join(blocks(page, "python"))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

    def words(text: str) -> list[str]:
        text = re.sub(r"^note:.*$", "", text, flags=re.MULTILINE)
        return re.sub(r"[-+]?[\d.]+(e-\d+)?", "0", text).split()

    assert words(done.stdout) == words("\n".join(blocks(page, "text")))


def test_the_reference_has_all_public_names() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    for module in (flmoe_kernels, explain):
        for name, value in vars(module).items():
            if not name.startswith("_") and not inspect.ismodule(value):
                assert f"::: {module.__name__}.{name}\n" in text, name


COMMANDS = sorted(
    {
        shlex.join(shlex.split(line, comments=True))
        for page in PAGES
        for text in blocks(page, "bash")
        if "../old" not in text
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("pip ") and "PATH_OF" not in line
    }
)


@pytest.fixture(scope="module")
def user_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints and samples that the pages name."""
    folder = tmp_path_factory.mktemp("user")
    fusion = FusionTransformer(
        num_modalities=2, hidden_dim=64, output_dim=5, num_layers=1, num_heads=4
    )
    layer = ReferenceInteractionMoE(2, fusion, hidden_dim=64, hidden_dim_rw=64)
    for name in ("checkpoint.pt", "model.pt", "mine.pt"):
        torch.save({"ensemble_model": layer.state_dict()}, folder / name)
    [snippet] = [
        str(block.values[0]) for block in BLOCKS if '"features.npz"' in str(block.values[0])
    ]
    subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True, timeout=60)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_it_stands(command: str, user_files: Path) -> None:
    """Dry runs of make, collection of benchmarks, help of the compile report; everything else runs in full."""
    words = shlex.split(command)
    match words[0]:
        case "make":
            words.insert(1, "-n")
        case "pytest":
            words = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words[1:]]
        case "python":
            words[0] = sys.executable
            if "bench.aot" in words:
                words.append("--help")
    ours = words[0] == "make" or "bench/" in words or "bench.aot" in words
    done = subprocess.run(
        words,
        cwd=ROOT if ours else user_files,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(
        r"`((?:bench|docs|csrc|tests|flmoe_kernels|examples)/[a-z_0-9./-]+)`", text
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("key", table.PAGES)
def test_tables_agree_with_the_results(key: str) -> None:
    page = table.PAGES[key].read_text().partition(table.MARK)[2].partition(table.END_MARK)[0]
    assert page.strip() == table.tables()[key].strip()


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert len(text.split()) <= 1200


def test_the_readmes_table_is_the_capability_table() -> None:
    expected = {
        operator: {
            backend: tuple(str(d).removeprefix("torch.") for d in row.get(backend, ()))
            for backend in BACKENDS
        }
        for operator, row in CAPABILITIES.items()
    }
    assert readme_table.table() == expected
