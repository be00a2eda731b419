"""Benchmarks of the experts of transformers models against transformers' implementations."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.suite import SECONDS, options
from flmoe_gate.gate import Against
from flmoe_gate.timing import Call
from flmoe_kernels.core.dtypes import dtype_name
from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.profile.cases import BOTH, FORWARD
from flmoe_kernels.profile.operators.routed_mlp import make_inputs
from flmoe_kernels.profile.shapes import (
    ROUTED_SHORT,
    ROUTED_SMALL_E4,
    ROUTED_SMALL_E16,
    RoutedShape,
)

# A prompt and a step of generation with experts of 1024 x 512.
PROMPT, STEP = (RoutedShape(f"tokens_{n}", n, 1024, 512, 16, 2) for n in (512, 8))
QUICK, FULL = (ROUTED_SHORT, STEP), (ROUTED_SMALL_E4, ROUTED_SMALL_E16, PROMPT)
SHAPES = [pytest.param(x, id=x.name) for x in (*QUICK, *FULL)]


class Contestant:
    """Experts of a Qwen3-MoE model with an implementation."""

    def __init__(
        self, shape: RoutedShape, dtype: torch.dtype, implementation: str, device: str
    ) -> None:
        models: Any = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
        importlib.import_module("flmoe_kernels.integrations.transformers").register()
        self.index, inputs = make_inputs(shape, "swiglu", device)
        config = models.Qwen3MoeConfig(
            hidden_size=shape.width,
            moe_intermediate_size=shape.hidden,
            num_experts=shape.experts,
            experts_implementation=implementation,
        )
        self.experts = models.Qwen3MoeExperts(config)
        fused = torch.cat([inputs["w_gate"], inputs["w_in"]], dim=1)
        self.experts.gate_up_proj = nn.Parameter(fused.to(dtype))
        self.experts.down_proj = nn.Parameter(inputs["w_out"].to(dtype))
        self.x, self.weight = (inputs[name].to(dtype).requires_grad_() for name in ("x", "weight"))

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.experts(self.x, self.index, self.weight)

    def both(self) -> tuple[Tensor, ...]:
        out = self.experts(self.x, self.index, self.weight)
        leaves = (self.x, self.weight, *self.experts.parameters())
        return torch.autograd.grad(out, leaves, self.x.detach())


@pytest.mark.parametrize("peer", ["grouped_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("phase", [FORWARD, BOTH])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_implementations(
    benchmark_against: Against,
    pytestconfig: pytest.Config,
    shape: RoutedShape,
    phase: str,
    dtype: torch.dtype,
    peer: str,
) -> None:
    device, full = options(pytestconfig)
    if shape in FULL and not full:
        pytest.skip("takes seconds; pass --full")

    def contestant(implementation: str, dtype: torch.dtype = dtype) -> Contestant:
        return Contestant(shape, dtype, implementation, device)

    def timed(implementation: str) -> Call:
        made = contestant(implementation)
        return made.forward if phase == FORWARD else made.both

    exact = contestant("eager", torch.float64)
    for leaf in (exact.x, exact.weight, *exact.experts.parameters()):
        leaf.data = leaf.data.to(dtype).double()
    out, low = contestant("flmoe").forward(), contestant(peer).forward()
    assert_within_budget(out, low, exact.forward(), shape.name)
    benchmark_against.benchmark.extra_info.update(ours="flmoe", shape=shape.name)
    benchmark_against(
        lambda: timed("flmoe"),
        lambda: timed(peer),
        name=f"transformers/{shape.name}/{phase}/{dtype_name(dtype)}",
        peer_name=peer,
        fresh=True,
        device=device,
        seconds=SECONDS[full],
    )
