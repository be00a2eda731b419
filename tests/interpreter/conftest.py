"""Collection of this folder only under TRITON_INTERPRET=1, where kernels run on CPU tensors.

Triton decides at import whether kernels are interpreted or compiled, and other tests compile them, so run
`TRITON_INTERPRET=1 pytest tests/interpreter`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def fast_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reduce the interpreter's work per launch, and silence NumPy's warnings about NaN and infinities."""
    from flmoe_kernels.core.triton.launches import interpreted
    from tests.support.triton_interpreter import patch_once_a_launch

    assert interpreted()
    patch_once_a_launch(monkeypatch)
    with np.errstate(all="ignore"):
        yield
