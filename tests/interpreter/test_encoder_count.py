"""Tests of the encoder's Triton kernels with a count: only the first rows of each view are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.ops.encoder.triton import fused
from flmoe_kernels.ops.encoder.triton.linear import linear, linear_backward
from flmoe_kernels.ops.encoder.triton.mlp import mlp, mlp_backward
from flmoe_kernels.ops.encoder.triton.rows import norm, norm_backward, views_backward, views_of
from tests.support.inputs import draw, make_seed
from tests.support.operator_cases import EPS, tensors
from tests.support.triton_interpreter import enlarge_row_tiles

# Two blocks of rows in every kernel, the second with a ragged edge.
EXPERTS, VIEWS, ROWS, WIDTH, HIDDEN = 2, 3, 70, 20, 24
ALL = [True] * 5
# What is in the rows after the count: nothing is written, or zeros; a sum over rows has none.
UNWRITTEN, ZEROS, SUM = "unwritten", "zeros", "sum"
# (count, dropout rate)
COUNTS = ((0, 0.5), (33, 0.5), (64, 0.5), (70, 0.5), (33, 0.0))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    enlarge_row_tiles(monkeypatch)


@dataclass(frozen=True)
class Call:
    """A function of tensors (experts, views, rows, ...), a count and views, and what its results have past the
    count."""

    function: Callable[..., Sequence[Tensor] | Tensor]
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[str, ...]
    merged: bool = True

    def inputs(self) -> list[Tensor]:
        return [draw(EXPERTS, *shape, seed=i) for i, shape in enumerate(self.shapes)]

    def run(self, inputs: list[Tensor], count: int | None) -> list[Tensor]:
        """Results with separate dimensions of views and rows, except sums."""
        rows = inputs[0].shape[2]
        given = [x.flatten(1, 2) if self.merged else x for x in inputs]
        at = None if count is None else torch.tensor([count], dtype=torch.int32)
        found = tensors(self.function(*given, at))
        return [
            x.unflatten(1, (-1, rows)) if self.merged and kind != SUM else x
            for x, kind in zip(found, self.results, strict=True)
        ]


def calls(p: float) -> dict[str, Call]:
    drop = (make_seed() if p else None, p)
    weight, bias = draw(EXPERTS, HIDDEN, WIDTH, seed=5), draw(EXPERTS, HIDDEN, seed=6)
    gain, shift = draw(EXPERTS, WIDTH, seed=7), draw(EXPERTS, WIDTH, seed=8)
    w_in, b_in, w_out = weight, bias, draw(EXPERTS, WIDTH, HIDDEN, seed=9)
    rows, wide, each = (VIEWS, ROWS, WIDTH), (VIEWS, ROWS, HIDDEN), (VIEWS, ROWS)
    kinds = (torch.arange(ROWS) % (VIEWS - 1)).to(torch.int32)

    def of_linear(x: Tensor, count: Tensor | None) -> Tensor:
        return linear(x, weight, bias, count, VIEWS)

    def of_linear_backward(grad: Tensor, x: Tensor, count: Tensor | None) -> Sequence[Tensor]:
        return linear_backward(grad, x, weight, True, True, True, count, VIEWS)

    def of_norm(residual: Tensor, update: Tensor, count: Tensor | None) -> Sequence[Tensor]:
        return norm(residual, update, gain, shift, *drop, EPS, count, VIEWS)

    def of_plain_norm(x: Tensor, count: Tensor | None) -> Sequence[Tensor]:
        return norm(x, None, gain, shift, None, 0.0, EPS, count, VIEWS)[1:]

    def of_norm_twice(x: Tensor, count: Tensor | None) -> Sequence[Tensor]:
        return norm(None, x, gain, shift, *drop, EPS, count, VIEWS)

    def of_norm_backward(*inputs: Tensor | None) -> Sequence[Tensor]:
        *given, count = inputs
        grads = norm_backward(*given, gain, *drop, False, ALL[:4], count, VIEWS)  # type: ignore[arg-type]
        # Without dropout both gradients of rows are the first.
        return grads if p else (grads[0], grads[0], *grads[2:])

    def of_mlp(x: Tensor, count: Tensor | None) -> Sequence[Tensor]:
        return mlp(x, w_in, b_in, w_out, shift, *drop, count, VIEWS)

    def of_mlp_backward(
        grad: Tensor, x: Tensor, hidden: Tensor, count: Tensor | None
    ) -> Sequence[Tensor]:
        return mlp_backward(grad, x, hidden, w_in, w_out, *drop, ALL, count, VIEWS)

    def of_views(x: Tensor, count: Tensor | None) -> Tensor:
        return views_of(x, kinds[: x.shape[2]], VIEWS, count)

    def of_views_backward(grad: Tensor, count: Tensor | None) -> Tensor:
        return views_backward(grad, kinds[: grad.shape[2]], count)

    return {
        **fused_calls(drop),
        "linear": Call(of_linear, (rows,), (UNWRITTEN,)),
        "linear_backward": Call(of_linear_backward, (wide, rows), (ZEROS, SUM, SUM)),
        "norm": Call(of_norm, (rows, rows), (UNWRITTEN,) * 4),
        "plain norm": Call(of_plain_norm, (rows,), (UNWRITTEN,) * 3),
        "norm twice": Call(of_norm_twice, (rows,), (UNWRITTEN,) * 4),
        "norm_backward": Call(
            of_norm_backward, (rows, rows, rows, each, each), (ZEROS, ZEROS, SUM, SUM)
        ),
        "mlp": Call(of_mlp, (rows,), (UNWRITTEN,) * 2),
        "mlp_backward": Call(of_mlp_backward, (rows, rows, wide), (ZEROS, *(SUM,) * 4)),
        "views": Call(of_views, ((2, ROWS, WIDTH),), (UNWRITTEN,), merged=False),
        "views_backward": Call(of_views_backward, (rows,), (ZEROS,), merged=False),
    }


def fused_calls(drop: tuple[Tensor | None, float]) -> dict[str, Call]:
    d, f = 16, 32
    rows, wide, each = (VIEWS, ROWS, d), (VIEWS, ROWS, f), (VIEWS, ROWS)
    square, w_in, w_out, w_qkv = (
        draw(EXPERTS, *shape, seed=5, scale=0.3) for shape in ((d, d), (f, d), (d, f), (3 * d, d))
    )
    vector, b_in = draw(EXPERTS, d, seed=6), draw(EXPERTS, f, seed=7)
    affine, mlp = (vector, vector), (w_in, b_in, w_out, vector)

    def both(grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Without dropout both gradients of rows are the first."""
        return grads if drop[0] is not None else (grads[0], grads[0], *grads[2:])

    def of_linear(x: Tensor, count: Tensor | None) -> Sequence[Tensor]:
        return fused.norm_linear(x, *affine, w_qkv, EPS, count, VIEWS)

    def of_add(residual: Tensor, x: Tensor, count: Tensor | None) -> Tensor:
        return fused.add_linear(residual, x, square, vector, *drop, count, VIEWS)

    def of_mlp(x: Tensor, count: Tensor | None) -> Sequence[Tensor]:
        return fused.norm_mlp(x, affine, mlp, drop, drop, EPS, True, count, VIEWS)

    def of_mlp_backward(*inputs: Any) -> Sequence[Tensor]:
        grad, update, *saved, count = inputs
        rest = (affine, w_in, w_out, drop, drop, False, [True] * 8)
        return both(fused.norm_mlp_backward(grad, update, tuple(saved), *rest, count, VIEWS))

    def of_linear_backward(*inputs: Any) -> Sequence[Tensor]:
        grad, out, *saved, count = inputs
        rest = (affine, w_qkv, drop, ALL)
        return both(fused.norm_linear_backward(grad, out, tuple(saved), *rest, count, VIEWS))

    sums = (ZEROS, ZEROS, SUM, SUM, SUM)
    saved = (rows, each, each)
    return {
        "norm_linear": Call(of_linear, (rows,), (UNWRITTEN,) * 3),
        "add_linear": Call(of_add, (rows, rows), (UNWRITTEN,)),
        "norm_mlp": Call(of_mlp, (rows,), (UNWRITTEN,) * 4),
        "norm_mlp_backward": Call(
            of_mlp_backward, (rows, rows, *saved, wide), (*sums, SUM, SUM, SUM)
        ),
        "norm_linear_backward": Call(
            of_linear_backward, (rows, (VIEWS, ROWS, 3 * d), *saved), sums
        ),
    }


def ending(inputs: list[Tensor], count: int, value: float) -> list[Tensor]:
    """Copies with a value in all rows after the count."""
    return [
        torch.cat([x[:, :, :count], torch.full_like(x[:, :, count:], value)], 2) for x in inputs
    ]


@pytest.mark.parametrize(("count", "p"), COUNTS)
@pytest.mark.parametrize("name", calls(0.5))
def test_results_of_the_first_rows(name: str, count: int, p: float) -> None:
    """They are those of a call in which all other rows are 0, with the same dropout; without dropout also those of
    a call with the first rows alone. The other rows are not read: here they are NaN."""
    call = calls(p)[name]
    inputs = call.inputs()
    found = call.run(ending(inputs, count, float("nan")), count)
    same = call.run(ending(inputs, count, 0.0), None)
    expected = [same]
    if not p:
        expected.append(call.run([x[:, :, :count] for x in inputs], None))
    for results in expected:
        for kind, got, want in zip(call.results, found, results, strict=True):
            if kind != SUM:
                got, want = got[:, :, :count], want[:, :, :count]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert bool((got != 0).any()) == (count > 0)
    for kind, got in zip(call.results, found, strict=True):
        if kind != SUM:
            rest = got[:, :, count:]
            assert (rest == 0).all() if kind == ZEROS else rest.isnan().all()


@pytest.mark.parametrize("name", calls(0.5))
def test_any_value_of_a_count_stays_within_the_rows(name: str) -> None:
    """Values reach the kernels unchecked, because checking them would wait for the GPU."""
    call = calls(0.5)[name]
    inputs = call.inputs()
    for count, inside in ((-5, 0), (ROWS + 1, ROWS), (2**31 - 1, ROWS)):
        for got, want in zip(call.run(inputs, count), call.run(inputs, inside), strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("name", calls(0.5))
def test_one_row_more_is_read(name: str) -> None:
    """Control of the tests above: a NaN in the last counted row reaches the results."""
    call = calls(0.0)[name]
    inputs = ending(call.inputs(), 32, float("nan"))
    for got, kind in zip(call.run(inputs, 33), call.results, strict=True):
        assert (got if kind == SUM else got[:, :, 32]).isnan().any()


def test_other_counts_are_refused() -> None:
    x, weight = draw(2, 6, 4), draw(2, 5, 4)
    for count, views, message in (
        (torch.tensor([3]), 2, "count: expected"),
        (torch.tensor([3, 3], dtype=torch.int32), 2, "count: expected"),
        (torch.tensor([3], dtype=torch.int32), 4, "views: expected a divisor of 6 rows, got 4"),
        (torch.tensor([3], dtype=torch.int32), 0, "views: expected a divisor of 6 rows, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(x, weight, None, count, views)
