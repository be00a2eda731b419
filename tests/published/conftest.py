"""Registration of the stand-ins' source as published code."""

from __future__ import annotations

import pytest

from flmoe_kernels.published import source
from flmoe_kernels.published.fingerprints import FINGERPRINTS
from tests.support.fingerprints import stand_ins


@pytest.fixture(autouse=True)
def known_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let methods of the stand-ins count as published code, for both variants."""
    monkeypatch.setitem(FINGERPRINTS, "fastmoe", stand_ins())
    monkeypatch.setattr(source, "PUBLISHED", source.PUBLISHED | {"layer", "compat"})
