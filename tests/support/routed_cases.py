"""Calls of routed_mlp, and comparisons with the reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import gate
from flmoe_kernels.profile.operators.draws import draw_logits
from tests.support.inputs import as_dtype, draw, gradients

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclasses.dataclass(frozen=True)
class RoutedCase:
    """A call. load: "even", "hot" for one expert with all first choices, "dropped" for a capacity that drops
    about a third of the rows, "none" for rows without experts, "zipf" for the benchmarks' loads of that name."""

    tokens: int
    width: int = 5
    hidden: int = 7
    experts: int = 3
    choices: int = 2
    act: str = "gelu"
    load: str = "even"
    bias: bool = True
    gated: bool = False

    def __str__(self) -> str:
        sizes = f"n{self.tokens}d{self.width}f{self.hidden}e{self.experts}k{self.choices}"
        gate = ":gated" if self.gated else ""
        return f"{sizes}:{self.act}:{self.load}{gate}" + ("" if self.bias else ":no bias")

    def index(self) -> Tensor:
        logits = draw(self.tokens, self.experts, dtype=torch.float64, seed=1)
        if self.load == "zipf":
            sizes = (self.tokens, self.experts, self.choices)
            logits = draw_logits(*sizes, "zipf", torch.Generator().manual_seed(1))
        if self.load == "hot":
            logits[:, self.experts // 2] += 100.0
        rows = self.tokens * self.choices
        capacity = max(1, 2 * rows // (3 * self.experts)) if self.load == "dropped" else None
        index = gate(logits, self.choices, capacity=capacity, backend="reference").index
        return torch.full_like(index, -1) if self.load == "none" else index

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate, those that the case has."""
        shapes = {
            "x": (self.tokens, self.width),
            "weight": (self.tokens, self.choices),
            "w_in": (self.experts, self.hidden, self.width),
            "b_in": (self.experts, self.hidden),
            "w_out": (self.experts, self.width, self.hidden),
            "b_out": (self.experts, self.width),
            "w_gate": (self.experts, self.hidden, self.width),
            "b_gate": (self.experts, self.hidden),
        }
        return {
            name: shape
            for name, shape in shapes.items()
            if (self.bias or not name.startswith("b_")) and (self.gated or "gate" not in name)
        }

    @property
    def names(self) -> list[str]:
        """Names of the results of `run`."""
        return ["out", *(f"grad_{name}" for name in self.shapes)]

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Values of `shapes`."""
        return [
            draw(
                *shape,
                dtype=dtype,
                seed=10 + i,
                scale=shape[-1] ** -0.5 if name.startswith("w_") else 1.0,
            )
            for i, (name, shape) in enumerate(self.shapes.items())
        ]

    def call(self, *inputs: Tensor, index: Tensor, backend: str | None = None) -> Tensor:
        """routed_mlp of `inputs`."""
        named: dict[str, Any] = {"b_in": None, "b_out": None}
        named |= zip(self.shapes, inputs, strict=True)
        return routed_mlp(index=index, act=self.act, backend=backend, **named)


def run(case: RoutedCase, inputs: list[Tensor], index: Tensor, backend: str) -> list[Tensor]:
    """out and its gradients by all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = case.call(*leaves, index=index, backend=backend)
    return [out.detach(), *gradients([out], leaves)]


def fused(case: RoutedCase, inputs: list[Tensor]) -> list[Tensor]:
    """The inputs with w_in, w_gate, b_in and b_gate as halves of gate_up_proj (E, 2 F, D) and its bias."""
    x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate = inputs
    up, of_up = torch.cat([w_gate, w_in], dim=1), torch.cat([b_gate, b_in], dim=1)
    half = case.hidden
    halves = up[:, half:], of_up[:, half:], w_out, b_out, up[:, :half], of_up[:, :half]
    return [x, weight, *halves]


def check(case: RoutedCase, dtype: torch.dtype, backend: str) -> list[list[Tensor]]:
    """Check all results; returns those of the backend, the reference and the oracle."""
    inputs, index = case.inputs(dtype), case.index()
    found = [
        run(case, inputs, index, backend),
        run(case, inputs, index, "reference"),
        run(case, as_dtype(inputs, torch.float64), index, "reference"),
    ]
    size = max((float(x.abs().max()) for x in found[2][1:] if x.numel()), default=0.0)
    for name, *triple in zip(case.names, *found, strict=True):
        largest = float(triple[2].abs().max()) if triple[2].numel() else 0.0
        assert_within_budget(
            *triple,
            f"{name} of {case} in {dtype}",
            magnitude=size if name != "out" else 0.0,
            may_vanish=largest < 0.1 * size,
        )
    return found


# One token, no token, less than a block, several blocks of an expert, one row less than two blocks, odd widths and
# widths beyond a panel.
SIZES = (
    RoutedCase(17),
    RoutedCase(1, 1, 1, 1, 1),
    RoutedCase(0, 4, 5),
    RoutedCase(300, 32, 64, 4),
    RoutedCase(130, 33, 70, 8, 3),
    RoutedCase(50, 16, 16, 64, 4),
    RoutedCase(257, 64, 200, 2, 1),
    RoutedCase(191, 8, 6, 1, 1),
    RoutedCase(97, 130, 3, 5, 2),
    RoutedCase(700, 9, 131, 3, 3),
)
