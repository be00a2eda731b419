"""Tests of the README and docs: snippets, links, tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("text", BLOCKS)
def test_a_snippet_runs(text: str, tmp_path: Path) -> None:
    file = tmp_path / "test_snippet.py"
    file.write_text(text)
    command = [sys.executable, str(file)]
    if "def test_" in text:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
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
