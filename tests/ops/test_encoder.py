"""Tests of the fusion encoder's operators against float64 references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.encoder import reference
from tests.support.encoder_cases import backward_calls, norm_arguments, operator_calls
from tests.support.encoder_tests import EncoderTests
from tests.support.inputs import as_dtype, cumulative, draw, make_seed
from tests.support.operator_cases import (
    DTYPES,
    EPS,
    OPS,
    compare,
    tensors,
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


@pytest.mark.parametrize("steady", [True, False])
def test_sums_over_many_rows(steady: bool) -> None:
    """Gradients of weights are sums over all tokens and views; their rounding error must not grow with the number.

    steady: all rows have the same gradient, as after mean pooling, so that nothing cancels.
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
    # With one column the norm is only its shift.
    compare(OPS.expert_norm, reference.expert_norm, arguments, dtype, may_vanish=width == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_dropout_add_norm(
    rows: int, width: int, residual: bool, p: float, dtype: torch.dtype
) -> None:
    arguments = norm_arguments(rows, width, p, residual)
    # Rows with one column, or dropped completely, have variance 0; half precision is not meaningful there.
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


def test_residual_and_update_have_separate_gradients() -> None:
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


class TestCpu(EncoderTests):
    backend, rows, width = "cpu", 62, 4
    precise = (torch.float32, torch.float64)

    @pytest.fixture(params=DTYPES, ids=str)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param


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
    for name, arguments in backward_calls(p):
        torch.library.opcheck(getattr(OPS, name).default, arguments)
