"""Tests of the Triton cells of the README's table."""

from __future__ import annotations

import pytest

from tests.support.readme_table import CELLS, check_cell


@pytest.mark.parametrize(("operator", "backend", "dtype"), [c for c in CELLS if c[1] == "triton"])
def test_every_cell_runs(operator: str, backend: str, dtype: str) -> None:
    check_cell(operator, backend, dtype)
