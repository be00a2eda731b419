"""Tests of what scripts of the published code do around a model, with stand-ins for its classes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.lineage import fl, i2
from tests.support.published_page import page_rows
from tests.support.scripts import ROWS, NotInThisCode, Row


@pytest.mark.parametrize("published", [fl, i2], ids=["fl_i2moe", "i2moe"])
@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_scripts_run_unmodified(row: Row, published: Any) -> None:
    try:
        assert row(published)
    except NotInThisCode:
        pytest.skip("no such use in this code")


def test_the_page_of_published_code_is_complete() -> None:
    """Each row has a treatment and a reason; the command of the page compares the rows with a checkout."""
    rows = page_rows()
    assert len(rows) > 150
    treatments = {"`swapped`", "`part of a swapped layer`", "`works with swap`", "`left alone`"}
    for cells in rows:
        assert len(cells) == 5, cells
        assert all(cell.strip() for cell in cells), cells
        assert cells[3] in treatments, cells
