"""Registration of the stand-ins' source as published code."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path

import pytest

from flmoe_kernels.published.fingerprints import FINGERPRINTS
from flmoe_kernels.published.source import fingerprint
from tests.support import lineage, lineage_sparse
from tests.support.fingerprints import Table, functions


@functools.cache
def stand_ins() -> Table:
    found: dict[str, set[str]] = defaultdict(set)
    for module in (lineage, lineage_sparse):
        for name, node in functions(Path(str(module.__file__)).read_text(encoding="utf-8")):
            found[name].add(fingerprint(node))
    return {name: tuple(prints) for name, prints in found.items()}


@pytest.fixture(autouse=True)
def known_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let methods of the stand-ins count as published code, for both variants."""
    monkeypatch.setitem(FINGERPRINTS, "fastmoe", stand_ins())
