"""Tests of the self-check's comparison with the Triton kernels."""

from __future__ import annotations

import pytest
import torch

from flmoe_kernels.core.backend import CAPABILITIES
from flmoe_kernels.core.dtypes import HALVES_AND_FLOAT32
from flmoe_kernels.ops.pair_moe import triton as pair_moe
from flmoe_kernels.profile.first_use import failure
from tests.support.triton_interpreter import round_to_nearest

CPU = torch.device("cpu")
# At the published widths the interpreter takes up to two minutes.
CASES = [
    pytest.param(op, dtype, marks=[] if op in ("pair_moe", "routing") else pytest.mark.slow)
    for op in CAPABILITIES
    for dtype in HALVES_AND_FLOAT32
]


@pytest.mark.parametrize(("op", "dtype"), CASES, ids=str)
def test_correct_kernels_pass(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest(monkeypatch)
    assert failure(op, "triton", dtype, CPU) == ""


def test_wrong_kernels_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pair_moe.backward

    def wrong(*args: object) -> tuple[torch.Tensor, ...]:
        grad_q, *others = right(*args)  # type: ignore[arg-type]
        return 1.01 * grad_q, *others

    monkeypatch.setattr(pair_moe, "backward", wrong)
    assert "gradient of q: error" in failure("pair_moe", "triton", torch.float32, CPU)
