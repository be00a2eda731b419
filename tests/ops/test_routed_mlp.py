"""Tests of the routed MLP's CPU kernels against the reference, and of the reference."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support.inputs import draw, gradients
from tests.support.routed_cases import ACTIVATIONS, DTYPES, NAMES, SIZES, RoutedCase, check, run

OPS = torch.ops.flmoe
BACKENDS = ("reference", "cpu")
BASE = RoutedCase(40, 6, 9, 4, 2)


@pytest.mark.parametrize("load", ["even", "hot", "dropped", "none", "zipf"])
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(case: RoutedCase, dtype: torch.dtype, load: str) -> None:
    check(dataclasses.replace(case, load=load), dtype, "cpu")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_biases(dtype: torch.dtype, bias: bool, act: str) -> None:
    check(dataclasses.replace(BASE, act=act, bias=bias), dtype, "cpu")


@pytest.mark.parametrize("experts", [1, 2, 5, 64])
def test_number_of_choices(experts: int) -> None:
    for choices in range(1, min(experts, 4) + 1):
        case = RoutedCase(70, experts=experts, choices=choices)
        check(case, torch.float32, "cpu")


def test_comparison_detects_a_wrong_result() -> None:
    """Negative control: another activation, and an error of a thousandth."""
    inputs, index = BASE.inputs(torch.float32), BASE.index()
    low = run(BASE, inputs, index, "reference")
    oracle = run(BASE, BASE.inputs(torch.float64), index, "reference")
    found = run(BASE, inputs, index, "cpu")
    other = run(dataclasses.replace(BASE, act="gelu_tanh"), inputs, index, "cpu")
    for name, one, bad, *rest in zip(NAMES, found, other, low, oracle, strict=True):
        if name != "grad_b_out":  # it does not depend on the activation
            assert_outside_budget(bad, *rest, name)
        assert_outside_budget(one * (1 + 1e-3), *rest, name)


def row_by_row(case: RoutedCase, inputs: list[Tensor], index: Tensor) -> Tensor:
    """Definition with an exact GELU, one row at a time."""
    x, weight, w_in, b_in, w_out, b_out = inputs
    out = torch.zeros_like(x)
    for n, k in itertools.product(range(case.tokens), range(case.choices)):
        e = int(index[n, k])
        if e < 0:
            continue
        pre = w_in[e] @ x[n] + b_in[e]
        hidden = torch.tensor(
            [0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in pre.tolist()], dtype=x.dtype
        )
        out[n] += weight[n, k] * (w_out[e] @ hidden + b_out[e])
    return out


@pytest.mark.parametrize("load", ["even", "dropped"])
def test_reference_is_the_definition(load: str) -> None:
    case = dataclasses.replace(BASE, tokens=9, load=load)
    inputs, index = case.inputs(torch.float64), case.index()
    expected = row_by_row(case, inputs, index)
    found = run(case, inputs, index, "reference")[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    for act, bias in itertools.product(ACTIVATIONS, (True, False)):
        case = RoutedCase(7, 3, 4, 3, 2, act, "dropped", bias)
        index = case.index()
        assert (index < 0).any()
        leaves = [x.requires_grad_() for x in case.inputs(torch.float64)]

        def call(
            *leaves: Tensor, case: RoutedCase = case, index: Tensor = index, act: str = act
        ) -> Tensor:
            x, weight, w_in, *rest = leaves
            b_in, w_out, b_out = rest if case.bias else (None, rest[0], None)
            return routed_mlp(x, index, weight, w_in, b_in, w_out, b_out, act=act, backend=backend)

        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(6))
def test_nan_and_inf_stay_in_their_own_rows(which: int, value: float) -> None:
    case = dataclasses.replace(BASE, act="silu")
    inputs, index = [x.abs() + 0.1 for x in case.inputs(torch.float32)], case.index()
    inputs[which].view(-1)[1] = value
    results = [run(case, inputs, index, backend) for backend in ("cpu", "reference")]
    assert not all(x.isfinite().all() for x in results[0])
    for name, got, want in zip(NAMES, *results, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite()), name


def test_same_bits_for_any_number_of_threads() -> None:
    case = RoutedCase(900, 40, 70, 5, 3, load="dropped")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(case, case.inputs(torch.float32), case.index(), "cpu"))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@settings(max_examples=50)
@given(
    tokens=st.integers(0, 60),
    width=st.integers(1, 40),
    hidden=st.integers(1, 80),
    experts=st.integers(1, 9),
    choices=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_load(
    tokens: int, width: int, hidden: int, experts: int, choices: int, seed: int
) -> None:
    case = RoutedCase(tokens, width, hidden, experts, choices)
    generator = torch.Generator().manual_seed(seed)
    # A token may choose an expert twice.
    index = torch.randint(-1, experts, (tokens, choices), generator=generator)
    inputs = case.inputs(torch.float64)
    found, oracle = run(case, inputs, index, "cpu"), run(case, inputs, index, "reference")
    size = max((float(x.abs().max()) for x in oracle if x.numel()), default=1.0)
    for name, got, want in zip(NAMES, found, oracle, strict=True):
        assert ((got - want).abs() <= 1e-11 * size).all(), name
    for one, other in zip(
        dispatch(index, experts), dispatch(index, experts, backend="reference"), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, w_in, b_in, w_out, b_out = BASE.inputs(dtype)
    _, offsets, permutation = dispatch(BASE.index(), 4)
    for biases in ((b_in, b_out), (None, None)):
        tail = (w_in, biases[0], w_out, biases[1], offsets, permutation, 0)
        out, hidden = OPS.routed_mlp(x, weight, *tail, "cpu")
        given = (torch.ones_like(out), hidden, x, weight, *tail)
        for wants in ([True, True, True, biases[0] is not None, False, False], [False] * 6):
            torch.library.opcheck(OPS.routed_mlp_backward.default, (*given, wants, "cpu"))
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        torch.library.opcheck(OPS.routed_mlp.default, (*leaves, *tail, "cpu"))


def test_compiled_whole_and_checkpointed() -> None:
    """Gate, dispatch and MLP are compiled to one graph, without data-dependent values or graph breaks."""
    inputs = [x.requires_grad_() for x in BASE.inputs(torch.float32)]
    router = draw(6, 4, seed=3).requires_grad_()

    def call(router: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        w_in, b_in, w_out, b_out = weights
        index, weight = gate(x @ router, 2, capacity=12)
        return routed_mlp(x, index, weight, w_in, b_in, w_out, b_out)

    leaves = [router, inputs[0], *inputs[2:]]
    expected = gradients([call(*leaves)], leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    for out in (compiled(*leaves), again):
        assert all(map(torch.equal, gradients([out], leaves), expected))
