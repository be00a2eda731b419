"""Comparison of docs/published_code.md with a checkout of the published code."""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path

from tests.support.checkout import Checkout

ROOT = Path(__file__).parents[2]


def page_rows() -> list[list[str]]:
    """Cells of the rows of docs/published_code.md: repository, file, class or script, treatment, reason."""
    lines = (ROOT / "docs/published_code.md").read_text().splitlines()
    tables = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [cells for cells in tables if cells[0] in ("FL", "I2", "both")]


def page_problems(published: Checkout) -> list[str]:
    """Classes and scripts of a checkout without a row on the page, and rows without a class or script."""
    code = "FL" if published.compat == "fl_i2moe" else "I2"
    rows = [[c.strip("`") for c in cells] for cells in page_rows() if cells[0] in (code, "both")]
    expected: set[tuple[str, str]] = set()
    optional: set[tuple[str, str]] = set()
    for file in [*published.root.glob("src/**/*.py"), *published.root.glob("scripts/**/*.sh")]:
        name = str(file.relative_to(published.root))
        tree = ast.parse(file.read_text() if file.suffix == ".py" else "")
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        expected.update((name, kind) for kind in classes)
        # A file of classes needs no row of its own, unless it is a script.
        is_script = not classes or any(
            isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body
        )
        (expected if is_script else optional).add((name, ""))
    problems = []
    matched: set[tuple[str, str]] = set()
    for _, file_name, what, *_ in rows:
        pattern = file_name.partition(" (")[0].strip("`")
        kind = what.removeprefix("class ").strip("`") if what.startswith("class ") else ""
        found = {x for x in expected | optional if fnmatch.fnmatch(x[0], pattern) and x[1] == kind}
        matched |= found
        if not found:
            problems.append(f"no such class or script: {pattern} {kind}")
    problems += [f"no row for {name} {kind}" for name, kind in sorted(expected - matched)]
    return problems
