"""Tests of the fusion encoder's operators against float64 references."""

from __future__ import annotations

import pytest
import torch

from flmoe_kernels.ops.encoder import reference
from tests.support.encoder_cases import norm_arguments
from tests.support.encoder_tests import EncoderTests, Size
from tests.support.inputs import as_dtype, draw
from tests.support.operator_cases import (
    DTYPES,
    OPS,
    compare,
)

# (rows, width): near multiples of a vector, of chunks of 64 rows and of groups of 128 columns.
SIZES = (
    (0, 16),
    (7, 1),
    (1, 3),
    (63, 16),
    (97, 17),
    (7, 64),
    (200, 100),
    (1, 256),
    (63, 256),
    (97, 300),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_expert_linear(rows: int, width: int, bias: bool, dtype: torch.dtype) -> None:
    for out_width in (width, 5 if width > 64 else 2 * width + 1):
        arguments = [
            draw(3, rows, width, seed=1),
            draw(3, out_width, width, seed=2, scale=width**-0.5),
            draw(3, out_width, seed=3) if bias else None,
        ]
        compare(OPS.expert_linear, reference.expert_linear, arguments, dtype)


def test_residual_and_update_have_separate_gradients() -> None:
    x, update, *rest = as_dtype(norm_arguments(5, 8, 0.0, True), torch.float32, requires_grad=True)
    OPS.dropout_add_norm(x, update, *rest)[0].sum().backward()
    x.grad.zero_()
    assert (update.grad == 1).all()


class TestCpu(EncoderTests):
    backend, rows, width, exhaustive = "cpu", 62, 4, True
    precise, many = (torch.float32, torch.float64), (6192, 6192, 6192)

    @pytest.fixture(params=[(0, *size, dtype) for size in SIZES for dtype in DTYPES], ids=str)
    def size(self, request: pytest.FixtureRequest) -> Size:
        return request.param

    @pytest.fixture(params=DTYPES, ids=str)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param
