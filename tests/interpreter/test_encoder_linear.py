"""Tests of expert_linear's Triton kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flmoe_kernels.ops.encoder import reference
from flmoe_kernels.ops.encoder.triton.linear import linear, linear_backward
from flmoe_kernels.ops.encoder.triton.linear_kernels import row_of, rows_of
from flmoe_kernels.ops.encoder.triton.linear_launch import TABLE, Tiles, operand
from tests.support.inputs import as_dtype, draw
from tests.support.operator_cases import compare, on_triton

NAMES = ("out", "grad_x", "grad_weight", "grad_bias")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    """x (experts, rows, inner) and weights (experts, outer, inner)."""

    experts: int
    rows: int
    inner: int
    outer: int
    bias: bool = True

    def inputs(self, dtype: torch.dtype) -> list[Any]:
        """x, weight and bias."""
        x = draw(self.experts, self.rows, self.inner, seed=1)
        scale = max(1, self.inner) ** -0.5
        weight = draw(self.experts, self.outer, self.inner, seed=2, scale=scale)
        bias = draw(self.experts, self.outer, seed=3) if self.bias else None
        return as_dtype([x, weight, bias], dtype)

    def cotangent(self, dtype: torch.dtype) -> Tensor:
        """Output gradient for `gradients`."""
        return draw(self.experts, self.rows, self.outer, dtype=BFLOAT16, seed=7).to(dtype)


# Ragged and prime sizes, whole tiles, widths below a tile, one column; rows in one share, two and more.
CASES = (
    (Case(1, 63, 128, 130), BFLOAT16),
    (Case(2, 130, 64, 128), BFLOAT16),
    (Case(3, 63, 60, 63), FLOAT16),
    (Case(2, 7, 300, 5), BFLOAT16),
    (Case(1, 1100, 17, 20), FLOAT16),
    (Case(1, 523, 64, 64), BFLOAT16),
    (Case(2, 97, 63, 70), FLOAT32),
    (Case(5, 70, 16, 48, bias=False), FLOAT32),
    (Case(8, 1, 3, 7), FLOAT32),
    (Case(2, 196, 1, 3), FLOAT32),
    (Case(1, 1, 1, 1), BFLOAT16),
    (Case(1, 1200, 40, 1), FLOAT32),
)


def run(inputs: list[Any], grad_out: Tensor) -> list[Tensor]:
    """Output and gradients."""
    return [linear(*inputs), *linear_backward(grad_out, *inputs[:2], True, True, True)]


def check(case: Case, dtype: torch.dtype) -> list[list[Tensor]]:
    pair = on_triton("expert_linear"), reference.expert_linear
    return compare(*pair, case.inputs(dtype), dtype, gradient_magnitude=0.0)


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("wants", [(False, True, False), (False, False, True)], ids=str)
def test_one_of_two_gradients_is_summed_over_shares(wants: tuple[bool, bool, bool]) -> None:
    case = Case(1, 520, 20, 24)
    x, weight, _ = case.inputs(BFLOAT16)
    grad_out = case.cotangent(BFLOAT16)
    complete = linear_backward(grad_out, x, weight, True, True, True)
    results = linear_backward(grad_out, x, weight, *wants)
    for name, wanted, got, want in zip(NAMES[1:], wants, results, complete, strict=True):
        assert torch.equal(got, want if wanted else want.new_zeros(0)), name


@pytest.mark.parametrize("sizes", [(2, 0, 5, 7), (0, 9, 5, 7), (2, 3, 0, 4), (2, 300, 5, 0)])
def test_empty_sums_are_zero(sizes: tuple[int, int, int, int]) -> None:
    case = Case(*sizes)
    inputs, grad_out = case.inputs(FLOAT32), case.cotangent(FLOAT32)
    out, grad_x, grad_weight, grad_bias = run(inputs, grad_out)
    assert torch.equal(out, inputs[2].unsqueeze(1).expand_as(out))
    assert out.shape == grad_out.shape
    assert torch.equal(grad_x, torch.zeros_like(inputs[0]))
    assert torch.equal(grad_weight, torch.zeros_like(inputs[1]))
    torch.testing.assert_close(grad_bias, grad_out.sum(1))


def test_rows_are_copied_only_if_they_cannot_be_read() -> None:
    def strided(experts: int, *strides: int) -> Tensor:
        return torch.empty_strided((experts, 3, 4), strides, device="meta")

    for x, kept in (
        (strided(2, 12, 4, 1), True),
        (strided(2, 21, 7, 1), True),
        (strided(1, 99, 2**24, 1), True),
        (strided(2, 22, 7, 1), False),
        (strided(1, 12, 2**24 + 1, 1), False),
        (strided(2, 6, 2, 2), False),
    ):
        result, of_row = operand(x)
        assert (result is x) == kept
        assert result.stride(2) == 1
        assert of_row == result.stride(1) <= 2**24
        assert result.stride(0) == 3 * of_row or len(x) == 1


def test_a_single_row_has_its_width_as_stride() -> None:
    """torch ignores the strides of dimensions of size 1, where kernels do not."""
    x = torch.empty_strided((2, 1, 4), (4, 99, 1), device="meta")
    assert x.is_contiguous()
    assert operand(x)[1] == 4


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("which", range(4))
def test_nan_and_inf_propagate(value: float, which: int) -> None:
    """NaN or infinity in x, a weight, a bias or the gradient reaches only the results that depend on it."""
    inputs, grad_out = Case(2, 70, 20, 24).inputs(FLOAT32), draw(2, 70, 24, seed=7).abs() + 0.1
    positive = [x.abs() + 0.1 for x in inputs]
    [*positive, grad_out][which].view(2, -1)[1, 13] = value
    low = as_dtype(positive, FLOAT32, requires_grad=True)
    out = reference.expert_linear(*low)
    expected = [out, *torch.autograd.grad(out, low, grad_out)]
    assert not all(x.isfinite().all() for x in expected)
    for name, got, want in zip(NAMES, run(positive, grad_out), expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isinf(), want.isinf()), name


@pytest.mark.parametrize("tiles", [(16, 32, 16, 1), (32, 64, 32, 4)], ids=str)
def test_other_tiles_give_the_same_numbers(
    tiles: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More blocks of rows than a band, and more than one block of columns."""
    case = Case(1, 150, 40, 72)
    inputs, grad_out = case.inputs(FLOAT32), case.cotangent(FLOAT32)
    expected = run(inputs, grad_out)
    for row in list(TABLE):
        monkeypatch.setitem(TABLE, row, Tiles(*tiles, 4, 1, (0, 0, 0)))
    for name, got, want in zip(NAMES, run(inputs, grad_out), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


@triton.jit
def offsets_kernel(x, y, out, expert, rows, row, WIDTH: tl.constexpr):
    """Byte offsets in an operand and in a contiguous tensor."""
    found, _ = rows_of(x, expert, rows, row)
    tl.store(out, found.to(tl.int64) - x[0].to(tl.int64))
    found = row_of(y, expert, rows, row, WIDTH)
    tl.store(out + 1, found.to(tl.int64) - y.to(tl.int64))


@pytest.mark.parametrize(
    ("expert", "rows", "row", "width"),
    [(7, 2**30, 2**29 + 5, 256), (3, 2**30, 0, 1), (0, 2**20, 2**19, 2**14), (200, 2**17, 3, 512)],
)
def test_offsets_pass_32_bits(expert: int, rows: int, row: int, width: int) -> None:
    """Each term of an offset exceeds 32 bits alone, and both together; no memory is read at the offsets."""
    y, out = torch.zeros(1, dtype=BFLOAT16), torch.zeros(2, dtype=torch.int64)
    offsets_kernel[(1,)]((y, 2**20), y, out, expert, rows, row, width)
    assert out.tolist() == [
        2 * (expert * rows + row) * 2**20,
        2 * (expert * rows + row) * width,
    ]
