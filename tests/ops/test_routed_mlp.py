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
from flmoe_kernels.ops.routed_mlp import cpu
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routed_mlp.call import RoutedCall
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support.inputs import draw, gradients
from tests.support.routed_cases import ACTIVATIONS, DTYPES, SIZES, RoutedCase, check, fused, run
from tests.support.routed_tests import BASE, RoutedTests, either

BACKENDS = ("reference", "cpu")
GATED = dataclasses.replace(BASE, act="silu", gated=True)


LOADS = ("even", "hot", "dropped", "none", "zipf")


@either
@pytest.mark.parametrize(
    ("case", "load", "dtype"),
    [
        (case, load, DTYPES[(i + j) % 4])
        for (i, case), (j, load) in itertools.product(enumerate(SIZES), enumerate(LOADS))
    ],
    ids=str,
)
def test_sizes(case: RoutedCase, load: str, dtype: torch.dtype, gated: bool) -> None:
    check(dataclasses.replace(case, load=load, gated=gated), dtype, "cpu")


@either
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_biases(dtype: torch.dtype, bias: bool, act: str, gated: bool) -> None:
    check(dataclasses.replace(BASE, act=act, bias=bias, gated=gated), dtype, "cpu")


@either
@pytest.mark.parametrize("experts", [1, 2, 5, 64])
def test_number_of_choices(experts: int, gated: bool) -> None:
    for choices in range(1, min(experts, 5) + 1):
        case = RoutedCase(70, experts=experts, choices=choices, gated=gated)
        check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", [BASE, GATED], ids=str)
def test_comparison_detects_a_wrong_result(case: RoutedCase) -> None:
    """Negative control: another activation, and an error of a thousandth."""
    inputs, index = case.inputs(torch.float32), case.index()
    low = run(case, inputs, index, "reference")
    oracle = run(case, case.inputs(torch.float64), index, "reference")
    found = run(case, inputs, index, "cpu")
    other = run(dataclasses.replace(case, act="gelu_tanh"), inputs, index, "cpu")
    for name, one, bad, *rest in zip(case.names, found, other, low, oracle, strict=True):
        if name != "grad_b_out":  # it does not depend on the activation
            assert_outside_budget(bad, *rest, name)
        assert_outside_budget(one * (1 + 1e-3), *rest, name)


def row_by_row(case: RoutedCase, inputs: list[Tensor], index: Tensor) -> Tensor:
    """Definition with an exact GELU, one row at a time."""
    x, weight, w_in, b_in, w_out, b_out, *of_gate = inputs
    out = torch.zeros_like(x)
    for n, k in itertools.product(range(case.tokens), range(case.choices)):
        e = int(index[n, k])
        if e < 0:
            continue
        before = w_in[e] @ x[n] + b_in[e]
        activated = of_gate[0][e] @ x[n] + of_gate[1][e] if case.gated else before
        hidden = torch.tensor(
            [0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in activated.tolist()], dtype=x.dtype
        )
        if case.gated:
            hidden *= before
        out[n] += weight[n, k] * (w_out[e] @ hidden + b_out[e])
    return out


@either
@pytest.mark.parametrize("load", ["even", "dropped"])
def test_reference_is_the_definition(load: str, gated: bool) -> None:
    case = dataclasses.replace(BASE, tokens=9, load=load, gated=gated)
    inputs, index = case.inputs(torch.float64), case.index()
    expected = row_by_row(case, inputs, index)
    found = run(case, inputs, index, "reference")[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class TestCpu(RoutedTests):
    backend, acts = "cpu", ("silu",)


@settings(max_examples=50)
@given(
    tokens=st.integers(0, 60),
    width=st.integers(1, 40),
    hidden=st.integers(1, 80),
    experts=st.integers(1, 9),
    choices=st.integers(1, 4),
    gated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_load(
    tokens: int, width: int, hidden: int, experts: int, choices: int, gated: bool, seed: int
) -> None:
    case = RoutedCase(tokens, width, hidden, experts, choices, gated=gated)
    generator = torch.Generator().manual_seed(seed)
    # A token may choose an expert twice.
    index = torch.randint(-1, experts, (tokens, choices), generator=generator)
    inputs = case.inputs(torch.float64)
    found, oracle = run(case, inputs, index, "cpu"), run(case, inputs, index, "reference")
    size = max((float(x.abs().max()) for x in oracle if x.numel()), default=1.0)
    for name, got, want in zip(case.names, found, oracle, strict=True):
        assert ((got - want).abs() <= 1e-11 * size).all(), name
    for one, other in zip(
        dispatch(index, experts), dispatch(index, experts, backend="reference"), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [BASE, GATED], ids=str)
def test_compiled_whole_and_checkpointed(case: RoutedCase) -> None:
    """Gate, dispatch and MLP are compiled to one graph, without data-dependent values or graph breaks."""
    inputs = [x.requires_grad_() for x in case.inputs(torch.float32)]
    router = draw(6, 4, seed=3).requires_grad_()

    def call(router: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        index, weight = gate(x @ router, 2, capacity=12)
        return case.call(x, weight, *weights, index=index)

    leaves = [router, inputs[0], *inputs[2:]]
    expected = gradients([call(*leaves)], leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    for out in (compiled(*leaves), again):
        assert all(map(torch.equal, gradients([out], leaves), expected))


def test_a_gated_mlp_is_exported() -> None:
    index = GATED.index()

    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return GATED.call(*inputs, index=index)

    inputs = GATED.inputs(torch.float32)
    program = torch.export.export(Model(), tuple(inputs))
    assert torch.equal(program.module()(*inputs), Model()(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_halves_of_a_fused_weight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise equal to separate weights, and the kernels read the weights without a copy."""
    read: list[Tensor] = []
    forward = cpu.forward

    def recorded(call: RoutedCall, save_hidden: bool) -> tuple[Tensor, Tensor]:
        read.extend([call.w_in, call.w_gate])
        return forward(call, save_hidden)

    monkeypatch.setattr(cpu, "forward", recorded)
    inputs, index = GATED.inputs(dtype), GATED.index()
    halves = fused(GATED, inputs)
    expected, found = (run(GATED, given, index, "cpu") for given in (inputs, halves))
    for name, got, want in zip(GATED.names, found, expected, strict=True):
        assert torch.equal(got, want), name
    assert [x.data_ptr() for x in read[2:]] == [halves[2].data_ptr(), halves[6].data_ptr()]


@pytest.mark.parametrize("missing", ["b_in", "b_gate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_the_two_hidden_biases(backend: str, missing: str) -> None:
    """It equals a bias of zeros."""
    inputs, index = dict(zip(GATED.shapes, GATED.inputs(torch.float32), strict=True)), GATED.index()
    options = {"index": index, "act": "silu", "backend": backend}
    found = routed_mlp(**{**inputs, missing: None}, **options)
    assert torch.equal(found, routed_mlp(**{**inputs, missing: inputs[missing] * 0}, **options))
    assert not torch.equal(found, routed_mlp(**inputs, **options))
