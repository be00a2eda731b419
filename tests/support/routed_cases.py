"""Calls of routed_mlp, and comparisons with the reference in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import gate
from flmoe_kernels.profile.operators.draws import draw_logits
from tests.support.inputs import as_dtype, draw, gradients

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
NAMES = ("out", "grad_x", "grad_weight", "grad_w_in", "grad_b_in", "grad_w_out", "grad_b_out")


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

    def __str__(self) -> str:
        sizes = f"n{self.tokens}d{self.width}f{self.hidden}e{self.experts}k{self.choices}"
        return f"{sizes}:{self.act}:{self.load}" + ("" if self.bias else ":no bias")

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

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """x, weight, w_in, b_in, w_out, b_out; without biases, the other four."""
        shapes = {
            "x": (self.tokens, self.width),
            "weight": (self.tokens, self.choices),
            "w_in": (self.experts, self.hidden, self.width),
            "b_in": (self.experts, self.hidden),
            "w_out": (self.experts, self.width, self.hidden),
            "b_out": (self.experts, self.width),
        }
        return [
            draw(
                *shape,
                dtype=dtype,
                seed=10 + i,
                scale=shape[-1] ** -0.5 if name.startswith("w_") else 1.0,
            )
            for i, (name, shape) in enumerate(shapes.items())
            if self.bias or not name.startswith("b_")
        ]


def run(case: RoutedCase, inputs: list[Tensor], index: Tensor, backend: str) -> list[Tensor]:
    """out and its gradients by all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    x, weight, w_in, *rest = leaves
    b_in, w_out, b_out = rest if case.bias else (None, rest[0], None)
    out = routed_mlp(x, index, weight, w_in, b_in, w_out, b_out, act=case.act, backend=backend)
    return [out.detach(), *gradients([out], leaves)]


def check(case: RoutedCase, dtype: torch.dtype, backend: str) -> list[list[Tensor]]:
    """Check all results; returns those of the backend, the reference and the oracle."""
    inputs, index = case.inputs(dtype), case.index()
    found = [
        run(case, inputs, index, backend),
        run(case, inputs, index, "reference"),
        run(case, as_dtype(inputs, torch.float64), index, "reference"),
    ]
    names = NAMES if case.bias else [name for name in NAMES if "_b_" not in name]
    size = max((float(x.abs().max()) for x in found[2][1:] if x.numel()), default=0.0)
    for name, *triple in zip(names, *found, strict=True):
        largest = float(triple[2].abs().max()) if triple[2].numel() else 0.0
        assert_within_budget(
            *triple,
            f"{name} of {case} in {dtype}",
            magnitude=size if name != "out" else 0.0,
            may_vanish=largest < 0.1 * size,
        )
    return found


# One token, no token, less than a block, several blocks of an expert, odd widths and widths beyond a panel.
SIZES = (
    RoutedCase(17),
    RoutedCase(1, 1, 1, 1, 1),
    RoutedCase(0, 4, 5),
    RoutedCase(300, 32, 64, 4),
    RoutedCase(130, 33, 70, 8, 3),
    RoutedCase(50, 16, 16, 64, 4),
    RoutedCase(257, 64, 200, 2, 1),
    RoutedCase(97, 130, 3, 5, 2),
    RoutedCase(700, 9, 131, 3, 3),
)
