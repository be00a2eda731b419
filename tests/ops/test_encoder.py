"""The fusion encoder's operators against their float64 references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.ops.encoder import reference
from tests.support.inputs import as_dtype, cumulative, draw, make_seed
from tests.support.operator_cases import (
    DTYPES,
    EPS,
    OPS,
    Operator,
    compare,
    evaluate,
    reference_losses,
    tensors,
)

# (rows, width): around whole vectors, chunks of 64 rows and groups of 128 columns.
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


def norm_arguments(rows: int, width: int, p: float, residual: bool) -> list[Any]:
    seed = make_seed() if p else None
    x, update = draw(2, rows, width, seed=1, scale=2), draw(2, rows, width, seed=2)
    gain, shift = draw(2, width, seed=3) + 1, draw(2, width, seed=4)
    return [x if residual else None, update, gain, shift, seed, p, EPS]


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


@pytest.mark.parametrize("steady", [True, False])
def test_sums_over_many_rows(steady: bool) -> None:
    """Gradients of weights are sums over all tokens and views: their rounding must not grow with them.

    Steady: every row's gradient is the same, as behind the mean pooling, so that nothing cancels.
    """
    rows, width = 6192, 16
    cotangent = draw(1, 1 if steady else rows, width, seed=4).expand(1, rows, width)
    x, weight, bias = draw(1, rows, width), draw(1, width, width, seed=1), draw(1, width, seed=2)
    calls = {
        "expert_linear": (lambda op: op, reference.expert_linear, [x, weight, bias]),
        "expert_norm": (
            lambda op: lambda *args: tensors(op(*args))[0],
            reference.expert_norm,
            [x, weight[:, 0], bias, EPS],
        ),
    }
    for name, (first, oracle, arguments) in calls.items():
        found = []
        for operator, dtype in (
            (first(getattr(OPS, name)), torch.float32),
            (first(oracle), torch.float32),
            (first(oracle), torch.float64),
        ):
            inputs = as_dtype(arguments, dtype, requires_grad=True)
            out = operator(*inputs)
            leaves = [each for each in inputs if isinstance(each, Tensor)]
            found.append(torch.autograd.grad(out, leaves, cotangent.to(dtype)))
        for i, triple in enumerate(zip(*found, strict=True)):
            assert_within_budget(*triple, f"gradient {i} of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_expert_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    _, x, gain, shift, *_ = norm_arguments(rows, width, 0.0, False)
    arguments = [x, gain, shift, EPS]
    # Of one column the norm is its shift alone.
    compare(OPS.expert_norm, reference.expert_norm, arguments, dtype, may_vanish=width == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_dropout_add_norm(
    rows: int, width: int, residual: bool, p: float, dtype: torch.dtype
) -> None:
    arguments = norm_arguments(rows, width, p, residual)
    # A row of one column, or dropped whole, has variance 0, where half precision says nothing.
    if width < (16 if p else 2) and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("rows of variance 0")
    compare(
        OPS.dropout_add_norm,
        reference.dropout_add_norm,
        arguments,
        dtype,
        outputs=2,
        may_vanish=width == 1,
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("residual", [True, False])
def test_dropout_add_norm_with_one_result_used(which: int, residual: bool) -> None:
    arguments = norm_arguments(70, 20, 0.3, residual)

    def only(operator: Operator) -> Operator:
        return lambda *args: operator(*args)[which]

    ops = only(OPS.dropout_add_norm), only(reference.dropout_add_norm)
    compare(*ops, arguments, torch.float32, may_vanish=which == 0)


def test_residual_and_update_have_gradients_of_their_own() -> None:
    x, update, *rest = as_dtype(norm_arguments(5, 8, 0.0, True), torch.float32, requires_grad=True)
    OPS.dropout_add_norm(x, update, *rest)[0].sum().backward()
    x.grad.zero_()
    assert (update.grad == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_gelu_dropout(rows: int, width: int, p: float, dtype: torch.dtype) -> None:
    arguments = [draw(2, rows, width, seed=1, scale=3), make_seed() if p else None, p]
    compare(OPS.gelu_dropout, reference.gelu_dropout, arguments, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu_over_its_whole_range(dtype: torch.dtype) -> None:
    """Pointwise: relative to the value where it is large, to the tail where it vanishes."""
    points = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([1e-30, -1e-30, 0.0, 50, -50])])
    x = points.to(dtype).view(1, 1, -1).requires_grad_()
    out = OPS.gelu_dropout(x, None, 0.0)
    (grad,) = torch.autograd.grad(out.sum(), x)
    x64 = x.detach().double().requires_grad_()
    exact = x64 * 0.5 * torch.special.erfc(-x64 / 2**0.5)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x64)
    eps = torch.finfo(dtype).eps
    for got, want in ((out, exact), (grad, exact_grad)):
        bound = 8 * eps * want.abs().clamp_min(0.1) if dtype == torch.float32 else 1e-14
        assert ((got - want).abs() <= bound).all()
    # In the left tail, where x * 0.5 * (1 + erf) cancels, the relative error stays small too.
    tail = (x64 < -1) & (x64 > -9)
    limit = 2e-5 if dtype == torch.float32 else 1e-12
    assert ((out - exact).abs()[tail] <= limit * exact.abs()[tail]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_dropout_add_pool(rows: int, width: int, p: float, dtype: torch.dtype) -> None:
    views, seed = 3, make_seed() if p else None
    x, update = (draw(2, views * rows, width, seed=i) for i in (1, 2))
    some = rows // 3
    for runs in ([some, 0, rows - some], [some, some], [], [0]):
        arguments = [x, update, cumulative(runs), views, seed, p]
        if not runs:
            out = OPS.dropout_add_pool(*arguments)
            assert out.shape == (2, views, 0, width)
            continue
        compare(OPS.dropout_add_pool, reference.dropout_add_pool, arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modalities", [2, 5])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_expand_views(rows: int, width: int, modalities: int, dtype: torch.dtype) -> None:
    modality = (torch.arange(rows) % modalities).to(torch.int32)
    arguments = [draw(2, 2, rows, width), modality, modalities + 1]
    results = compare(OPS.expand_views, reference.expand_views, arguments, dtype)
    assert torch.equal(results[0][0], results[0][1]), "a copy has no rounding"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_results_fail(dtype: torch.dtype) -> None:
    """The control of the comparisons above: another mask, operand or run is outside the budget."""
    norm = norm_arguments(63, 64, 0.5, True)
    triples = compare(OPS.dropout_add_norm, reference.dropout_add_norm, norm, dtype, outputs=2)
    update = draw(2, 63, 64, seed=2)
    wrong_norms = [[*norm[:4], make_seed(1), 0.5, EPS], [norm[1], norm[0], *norm[2:]]]
    wrong_norms.append([None, *norm[1:]])
    for wrong in wrong_norms:
        results = OPS.dropout_add_norm(*as_dtype(wrong, dtype))[:2]
        for got, (_, low, oracle) in zip(results, triples[:2], strict=True):
            assert_outside_budget(got, low, oracle, "dropout_add_norm")
    pool: list[Any] = [update, norm[0], cumulative([30, 33]), 1, make_seed(), 0.5]
    _, low, oracle = compare(OPS.dropout_add_pool, reference.dropout_add_pool, pool, dtype)[0]
    wrong_runs = [*pool[:2], cumulative([31, 32]), *pool[3:]]
    got = OPS.dropout_add_pool(*as_dtype(wrong_runs, dtype))
    assert_outside_budget(got, low, oracle, "dropout_add_pool")
    x, weight, bias = draw(2, 9, 64), draw(2, 64, 64, seed=1), draw(2, 64, seed=2)
    _, low, oracle = compare(OPS.expert_linear, reference.expert_linear, [x, weight, bias], dtype)[
        0
    ]
    for wrong in ([x, weight.mT, bias], [x, weight, None], [x, weight.flip(0), bias]):
        got = OPS.expert_linear(*as_dtype(wrong, dtype))
        assert_outside_budget(got, low, oracle, "expert_linear")


def operator_calls(dtype: torch.dtype, p: float) -> dict[str, list[Any]]:
    """Arguments of every operator with a gradient, small."""
    seed = make_seed() if p else None
    linear = [draw(2, 5, 3, dtype=dtype), draw(2, 4, 3, dtype=dtype), draw(2, 4, dtype=dtype)]
    norm = as_dtype(norm_arguments(5, 4, p, True), dtype)
    plain = as_dtype(norm_arguments(5, 4, p, False), dtype)
    rows = [draw(2, 6, 4, dtype=dtype, seed=i) for i in (1, 2)]
    runs, modality = cumulative([2, 0]), torch.tensor([0, 1, 1], dtype=torch.int32)
    return {
        "expert_linear": linear,
        "expert_linear without bias": [*linear[:2], None],
        "expert_norm": [norm[0], norm[2], norm[3], EPS],
        "dropout_add_norm": norm,
        "dropout_add_norm without residual": plain,
        "gelu_dropout": [rows[0], seed, p],
        "dropout_add_pool": [*rows, runs, 2, seed, p],
        "expand_views": [draw(2, 2, 3, 4, dtype=dtype), modality, 3],
        "interaction_losses": [draw(4, 3, 2, 5, dtype=dtype)],
    }


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", operator_calls(torch.float64, 0.0))
def test_gradcheck(name: str, p: float) -> None:
    arguments = as_dtype(operator_calls(torch.float64, p)[name], torch.float64, requires_grad=True)
    operator = getattr(OPS, name.split()[0])
    differentiable = 2 if name.startswith("dropout_add_norm") else 1
    assert torch.autograd.gradcheck(
        lambda *args: tuple(tensors(operator(*args))[:differentiable]), arguments
    )


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", operator_calls(torch.float64, 0.0))
def test_opcheck(name: str, p: float) -> None:
    arguments = as_dtype(operator_calls(torch.float32, p)[name], torch.float32, requires_grad=True)
    torch.library.opcheck(getattr(OPS, name.split()[0]).default, tuple(arguments))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck_of_backwards(p: float) -> None:
    seed = make_seed() if p else None
    x, grad = draw(2, 6, 4), draw(2, 6, 4, seed=1)
    gain, stats = draw(2, 4, seed=2), draw(2, 6, seed=3)
    weight, runs = draw(2, 4, 4, seed=4), cumulative([2, 1])
    modality = torch.tensor([0, 1, 1], dtype=torch.int32)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("expert_linear_backward", (grad, x, weight, *wants))
        for wants in ((True, True, True), (True, False, False), (False, False, True))
    ]
    norm = (x, stats, stats, gain, seed, p)
    calls += [
        ("dropout_add_norm_backward", (*grads, *norm, own, want))
        for grads in ((grad, grad), (None, grad), (grad, None), (None, None))
        for own, want in ((True, True), (False, True), (False, False))
    ]
    calls += [
        ("gelu_dropout_backward", (grad, x, seed, p)),
        ("dropout_add_pool_backward", (draw(2, 2, 2, 4), runs, 2, 6, seed, p)),
        ("expand_views_backward", (draw(2, 3, 3, 4), modality)),
        ("interaction_losses_backward", (draw(4), draw(4, 3, 2, 5))),
    ]
    for name, arguments in calls:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_strided_arguments_equal_contiguous_ones() -> None:
    for name, arguments in operator_calls(torch.float64, 0.5).items():
        operator = getattr(OPS, name.split()[0])
        strided = [
            torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
            if isinstance(x, Tensor) and x.dtype.is_floating_point
            else x
            for x in arguments
        ]
        outputs = len(tensors(operator(*arguments)))
        differentiable = 2 if name.startswith("dropout_add_norm") else min(outputs, 1)
        both = [
            evaluate(operator, [as_dtype(x, torch.float64, True) for x in each], differentiable)
            for each in (arguments, strided)
        ]
        assert all(map(torch.equal, *both)), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(value: float) -> None:
    for name, arguments in operator_calls(torch.float32, 0.0).items():
        arguments = as_dtype(arguments, torch.float32)
        target = arguments[0] if arguments[0] is not None else arguments[1]
        target.view(-1)[1] = value
        exact = as_dtype(arguments, torch.float64)
        stem = name.split()[0]
        oracle = reference_losses if stem == "interaction_losses" else getattr(reference, stem)
        got, want = tensors(getattr(OPS, stem)(*arguments))[0], tensors(oracle(*exact))[0]
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isposinf(), want.isposinf()), name
        assert not got.isfinite().all(), name
