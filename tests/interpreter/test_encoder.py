"""Tests of the encoder's operators on their Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from flmoe_kernels.ops.encoder import op as _op  # noqa: F401  registers the operators
from flmoe_kernels.ops.encoder import reference
from flmoe_kernels.ops.encoder.triton import rows_launch
from flmoe_kernels.ops.encoder.triton.rows_tiles import begin
from tests.support.encoder_cases import (
    operator_calls,
)
from tests.support.encoder_tests import EncoderTests, Size
from tests.support.inputs import as_dtype, cumulative, draw, make_seed
from tests.support.operator_cases import EPS, OPS, compare, evaluate, on_triton
from tests.support.triton_interpreter import enlarge_row_tiles

TRITON = "triton"
ALL = [True] * 4
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
# (rows, width): near the limits of parts, groups of 128 columns, blocks of rows and blocks of columns.
SIZES = ((7, 1), (0, 16), (37, 63), (9, 300), (35, 256), (1, 1100))
TABLE = dict(rows_launch.TABLE)


def small_calls(p: float, rows: int) -> dict[str, list[Any]]:
    """Calls with one expert and width 70."""
    return operator_calls(FLOAT32, p, rows, 70, 1)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_other_tiles_give_the_same_numbers compares with the table's tiles."""
    enlarge_row_tiles(monkeypatch)


def test_a_mean_far_from_zero_keeps_the_variance() -> None:
    """The variance is computed from centred values; from a mean of squares it would lose all digits."""
    x, gain = draw(1, 5, 140) + 3000, draw(1, 140, seed=1)
    compare(on_triton("expert_norm"), reference.expert_norm, [x, gain, gain, EPS], FLOAT32)


# Runs of the rows of a view: segments in order, an empty one, uncovered rows at the end and at the beginning.
RUNS = {
    "covering": lambda rows: cumulative([rows // 3, 0, rows - rows // 3]),
    "ends early": lambda rows: cumulative([rows // 3, rows // 3]),
    "begins late": lambda rows: cumulative([0, rows // 3], rows // 3),
    "empty": lambda rows: cumulative([0]),
}


@pytest.mark.parametrize(("runs", "p"), [*zip(RUNS, (0.5, 0.0, 0.5, 0.5), strict=True)])
def test_rows_of_no_segment_get_zeros(runs: str, p: float) -> None:
    """Values in such rows, even NaN, do not reach any mean."""
    rows, views, cu, seed = 24, 2, RUNS[runs](24), make_seed() if p else None
    covered = torch.zeros(rows, dtype=torch.bool)
    covered[cu[0] : cu[-1]] = True
    everywhere = covered.repeat(views).view(1, -1, 1)
    x, update = (draw(1, views * rows, 60, seed=i) for i in (1, 2))
    bad = [torch.where(everywhere, each, float("nan")).requires_grad_() for each in (x, update)]
    out = OPS.dropout_add_pool(*bad, cu, views, seed, p, TRITON)
    assert torch.equal(out, OPS.dropout_add_pool(x, update, cu, views, seed, p, TRITON))
    for grad in torch.autograd.grad(out, bad, torch.ones_like(out)):
        assert (grad[:, ~covered.repeat(views)] == 0).all()
        assert grad.isfinite().all()
        assert bool((grad != 0).any()) == bool(covered.any())


@pytest.mark.parametrize("bounds", [[-5, 2, 99], [0, 4, 2], [9, 12], [-(2**31), 2**31 - 1]])
def test_segments_out_of_range_touch_nothing_else(bounds: list[int]) -> None:
    """Such bounds reach the kernels only if values are not checked before, as on a GPU."""
    rows, views, cu = 6, 2, torch.tensor(bounds, dtype=torch.int32)
    wide = [torch.full((3 * views * rows + 80, 4), float("nan")) for _ in range(4)]
    inside = slice(40, 40 + views * rows)
    for i, x in enumerate(wide[:2]):
        x[inside] = draw(views * rows, 4, seed=i)
    residual, update, *grads = (x[inside].unsqueeze(0) for x in wide)
    out = torch.full((1, views, len(bounds) - 1, 4), float("nan"))
    dropout = rows_launch.Dropout(make_seed(), 0.5)
    rows_launch.pool_launch(residual, update, cu, dropout, out).run()
    assert out.isfinite().all()
    rows_launch.pool_gradient_launch(out, cu, dropout, grads[0], grads[1]).run()
    for x in wide[2:]:
        assert x[:40].isnan().all()
        assert x[40 + views * rows :].isnan().all()
        assert x[inside].isfinite().all()


class TestTriton(EncoderTests):
    backend, rows, width, precise = TRITON, 6, 70, (FLOAT32,)
    exhaustive, many = False, (9000, 700, 700)

    @pytest.fixture(params=[(i, *size, DTYPES[i % 3]) for i, size in enumerate(SIZES)], ids=str)
    def size(self, request: pytest.FixtureRequest) -> Size:
        return request.param

    @pytest.fixture(params=[BFLOAT16, pytest.param(FLOAT32, marks=pytest.mark.slow)], ids=str)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param


def test_other_tiles_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the order of sums over rows depends on tiles."""
    calls = small_calls(0.5, 9)

    def results() -> dict[str, list[Tensor]]:
        return {
            name: evaluate(on_triton(name.split()[0]), as_dtype(args, FLOAT32, True), 1)
            for name, args in calls.items()
        }

    expected = results()
    for key, tiles in TABLE.items():
        monkeypatch.setitem(rows_launch.TABLE, key, tiles)
    for name, found in results().items():
        for got, want in zip(found, expected[name], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_no_rows_leave_zeros_for_sums(dtype: torch.dtype) -> None:
    x, stats, gain = draw(2, 0, 9, dtype=dtype), draw(2, 0), draw(2, 9, dtype=dtype)
    for grads in ((x, x), (x, None), (None, x)):
        found = OPS.dropout_add_norm_backward(
            *(*grads, x, stats, stats, gain, make_seed(), 0.5), False, ALL, TRITON
        )
        assert [tuple(each.shape) for each in found] == [(2, 0, 9)] * 2 + [(2, 9)] * 2
        assert all((each == 0).all() for each in found[2:])


@triton.jit
def begin_kernel(x, out, row, WIDTH: triton.language.constexpr):
    triton.language.store(out, begin(x, row, WIDTH).to(triton.language.int64))
    triton.language.store(out + 1, x.to(triton.language.int64))


def test_offsets_pass_32_bits() -> None:
    """Offsets are only computed; no memory is read at them."""
    out, x = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=BFLOAT16)
    begin_kernel[(1,)](x, out, 2**30 + 3, 4096)
    assert int(out[0] - out[1]) == 2 * 4096 * (2**30 + 3)
