"""Collection of this folder only where kernels run on CPU tensors.

Triton decides at import whether kernels are interpreted or compiled, and other tests compile them, so run
`TRITON_INTERPRET=1 pytest tests/interpreter`. `FLMOE_EMULATE=80 pytest tests/interpreter` executes the kernels
compiled for sm_80 in the emulator of tests/support/ptx.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

EMULATE = os.environ.get("FLMOE_EMULATE")
collect_ignore_glob = [] if EMULATE or os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulator, which must find nothing; or an interpreter with less work per launch, without NumPy's warnings
    about NaN and infinities."""
    if EMULATE:
        from tests.support.ptx.emulator import emulated

        with emulated(int(EMULATE)) as findings:
            yield
        assert not findings, findings
        return
    from flmoe_kernels.core.triton import plans
    from flmoe_kernels.core.triton.launches import interpreted
    from tests.support.triton_interpreter import patch_once_a_launch

    assert interpreted()
    patch_once_a_launch(monkeypatch)
    monkeypatch.setattr(plans, "_plans", {})  # tests change launch tables
    with np.errstate(all="ignore"):
        yield
