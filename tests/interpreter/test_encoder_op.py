"""Tests of the encoder's registered operators with Triton's kernels: what they accept, trace and agree with.

test_encoder_rows_triton runs them in a process of their own, in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.ops.encoder import reference
from flmoe_kernels.ops.encoder.triton import rows_launch
from tests.support.encoder_triton_calls import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    TRITON,
    backward_calls,
    few_programs,
    norm_arguments,
    on_triton,
    operator_calls,
)
from tests.support.inputs import as_dtype, cumulative, draw, make_seed
from tests.support.operator_cases import EPS, OPS, evaluate, tensors

TABLE = dict(rows_launch.TABLE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)


def test_other_tiles_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows are added up in another order; nothing else depends on tiles."""
    calls = operator_calls(FLOAT32, 0.5, 9)

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


def test_agrees_with_the_cpu() -> None:
    """Every result of every operator, those that no gradient goes through among them, in shape and value; also
    with a seed and a rate that drops nothing."""
    forward = operator_calls(FLOAT32, 0.5, 3).items()
    calls = [(name.split()[0], tuple(args)) for name, args in forward]
    for name, arguments in [*calls, *backward_calls(0.5), *backward_calls(1e-6)]:
        operator = getattr(OPS, name)
        found, expected = (tensors(operator(*arguments, each)) for each in (TRITON, "cpu"))
        for got, want in zip(found, expected, strict=True):
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_no_rows_leave_zeros_for_sums(dtype: torch.dtype) -> None:
    x, stats, gain = draw(2, 0, 9, dtype=dtype), draw(2, 0), draw(2, 9, dtype=dtype)
    for grads in ((x, x), (x, None), (None, x)):
        found = OPS.dropout_add_norm_backward(
            *(*grads, x, stats, stats, gain, make_seed(), 0.5), False, True, TRITON
        )
        assert [tuple(each.shape) for each in found] == [(2, 0, 9)] * 2 + [(2, 9)] * 2
        assert all((each == 0).all() for each in found[2:])


def test_opcheck() -> None:
    """Schemas and fakes; autograd is checked with the CPU's kernels, and by tracing below."""
    checks = ("test_schema", "test_faketensor")
    for name, arguments in operator_calls(FLOAT32, 0.0, 3).items():
        operator = getattr(OPS, name.split()[0]).default
        torch.library.opcheck(operator, (*arguments, TRITON), test_utils=checks)
    for name, given in backward_calls(0.5):
        torch.library.opcheck(getattr(OPS, name).default, (*given, TRITON), test_utils=checks[1:])


def test_strided_arguments_equal_contiguous_ones() -> None:
    for name, arguments in operator_calls(FLOAT32, 0.0, 2).items():
        strided = [
            torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
            if isinstance(x, Tensor) and x.dtype.is_floating_point
            else x
            for x in arguments
        ]
        outputs = 2 if name.startswith("dropout_add_norm") else 1
        both = [
            evaluate(on_triton(name.split()[0]), as_dtype(each, FLOAT32, True), outputs)
            for each in (arguments, strided)
        ]
        assert all(map(torch.equal, *both)), name


def test_nan_and_inf_propagate() -> None:
    for name, arguments in operator_calls(FLOAT32, 0.0, 3).items():
        arguments = as_dtype(arguments, FLOAT32)
        target = arguments[0] if arguments[0] is not None else arguments[1]
        target.view(-1)[1], target.view(-1)[-1] = float("nan"), float("inf")
        stem = name.split()[0]
        got = tensors(getattr(OPS, stem)(*arguments, TRITON))[0]
        want = tensors(getattr(reference, stem)(*as_dtype(arguments, torch.float64)))[0]
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isposinf(), want.isposinf()), name
        assert torch.equal(got.isneginf(), want.isneginf()), name
        assert got.isnan().any(), name
        assert not got.isnan().all(), name


def refusals() -> list[tuple[str, tuple[Any, ...], str]]:
    """Calls that would read past a tensor, or as another type, and what is said of them."""
    x, gain, stats, cu = draw(2, 6, 4), draw(2, 4), draw(2, 6), cumulative([3])
    half, double, seeds = x.to(FLOAT16), x.double(), torch.zeros(2, dtype=torch.int64)
    modality, pair, means = torch.zeros(6).int(), draw(2, 2, 6, 4), draw(2, 1, 1, 4)
    many = pair[:1, :, :1, :1].expand(1, 2, 2**28, 1)
    drop, none = (make_seed(), 0.5), (None, 0.0)
    saved = (x, stats, stats, gain, *drop, False, True)
    return [
        ("expert_norm", (double, gain, gain, EPS), "residual: expected float32, bfloat16"),
        ("expert_norm", (x[0], gain, gain, EPS), "residual: expected 3 dimensions"),
        ("expert_norm", (x, gain[:1], gain, EPS), "gain: expected"),
        ("expert_norm", (x, gain, gain.double(), EPS), "shift: expected"),
        ("dropout_add_norm", (x[:, :5], x, gain, gain, *drop, EPS), "residual: expected"),
        ("dropout_add_norm", (half, x, gain, gain, *drop, EPS), "residual: expected"),
        ("dropout_add_norm", (x, x, gain, gain, seeds, 0.5, EPS), "seed: expected"),
        ("dropout_add_norm_backward", (x[:1], x, *saved), "grad_total: expected"),
        ("dropout_add_norm_backward", (x, half, *saved), "grad_normed: expected"),
        ("dropout_add_norm_backward", (x, x, x, stats[:1], *saved[2:]), "mean: expected"),
        ("dropout_add_norm_backward", (x, x, x, stats, stats.half(), *saved[3:]), "rstd: expected"),
        ("gelu_dropout", (x.int(), *none), "x: expected float32"),
        ("gelu_dropout_backward", (x[:, :5], x, *none), "grad_out: expected"),
        ("dropout_add_pool", (x, half, cu, 2, *none), "update: expected"),
        ("dropout_add_pool", (x, x, cu.long(), 2, *none), "cu_segments: expected"),
        ("dropout_add_pool", (x, x, cu[:0], 2, *none), "cu_segments: expected"),
        ("dropout_add_pool", (x, x, cu, 4, *none), "views: expected a divisor of 6 rows, got 4"),
        ("dropout_add_pool_backward", (means, cu, 2, 6, *none), "grad_out: expected"),
        ("dropout_add_pool_backward", (means, cu, 0, 6, *none), "views: expected"),
        ("expand_views", (pair[:, :1], modality, 3), "x: expected"),
        ("expand_views", (pair, modality.long(), 3), "modality: expected"),
        ("expand_views_backward", (pair, modality[:5]), "modality: expected"),
        # Of more rows than 32 bits count.
        ("gelu_dropout", (x[:1, :1, :1].expand(1, 2**30 + 1, 1), *none), "x: expected up to 2.30"),
        ("dropout_add_pool_backward", (means, cu, 1, 2**30 + 1, *none), "rows: expected up to"),
        ("expand_views", (many, modality[:1].expand(2**28), 5), "views: expected up to"),
    ]


@pytest.mark.parametrize(("name", "arguments", "message"), refusals(), ids=lambda x: str(x)[:40])
def test_refuses_what_would_read_past_a_tensor(
    name: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(OPS, name)(*arguments, TRITON)


def test_compiles_in_one_graph() -> None:
    seed, cu, weight = make_seed(), cumulative([2, 1]), draw(1, 20, 20, seed=5)
    arguments = norm_arguments(3, 20, 0.5, True, 1)

    def call(residual: Tensor, update: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        total, normed, _, _ = OPS.dropout_add_norm(
            residual, update, gain, shift, seed, 0.5, EPS, TRITON
        )
        update = OPS.gelu_dropout(normed, seed, 0.5, TRITON)
        update = OPS.expert_linear(update, weight, shift, TRITON)
        return OPS.dropout_add_pool(total, update, cu, 1, seed, 0.5, TRITON)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [
        evaluate(each, as_dtype(arguments[:4], FLOAT32, True), 1) for each in (call, compiled)
    ]
    assert all(map(torch.equal, *results))
