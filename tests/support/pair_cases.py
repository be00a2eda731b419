"""Calls of pair_moe, and comparisons with the reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels import pair_moe
from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.pair_moe.kinds import DEFAULT_KINDS, KINDS
from tests.support.inputs import as_dtype, draw, gradients

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("y", "mass", "grad_q", "grad_k", "grad_a", "grad_c", "grad_gate_bias")
REDUCTIONS = ("none", "experts", "pool")
MANY = (*KINDS, "synergy", "unique_a", "redundancy")  # eight experts, all kinds


@dataclasses.dataclass(frozen=True)
class PairCase:
    """A call. masks: "none", "a", "b", "both", or "sample" for both with a completely padded sample."""

    rows: int
    columns: int
    rank: int = 5
    width: int = 6
    kinds: tuple[str, ...] = DEFAULT_KINDS
    reduce: str = "none"
    top_k: int | None = None
    masks: str = "none"
    batch: int = 2
    bias: bool = True
    temperature: float = 1.0

    def __str__(self) -> str:
        kinds = "".join(kind[0] + kind[-1] for kind in self.kinds)
        sizes = f"{self.rows}x{self.columns}r{self.rank}v{self.width}b{self.batch}"
        return f"{sizes}:{kinds}:{self.reduce}:k{self.top_k}:{self.masks}"

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, a, c, and the gate's bias if it has one; logits differ enough for top_k."""
        batch, experts = self.batch, len(self.kinds)
        shapes = [(self.rows, self.rank), (self.columns, self.rank)]
        shapes += [(self.rows, self.width), (self.columns, self.width)]
        # Every second tensor has the layout of a projection: (B, L, E, width), transposed to (B, E, L, width).
        found = [
            draw(batch, length, experts, size, dtype=dtype, seed=i, scale=scale).transpose(1, 2)
            if i % 2
            else draw(batch, experts, length, size, dtype=dtype, seed=i, scale=scale)
            for i, ((length, size), scale) in enumerate(
                zip(shapes, (1.5, 1.5, 1.0, 1.0), strict=True)
            )
        ]
        return [*found, draw(experts, dtype=dtype, seed=4)] if self.bias else found

    def options(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        masks: list[Tensor | None] = []
        for side, length in (("a", self.rows), ("b", self.columns)):
            mask = torch.rand((self.batch, length), generator=generator) < 0.6
            if self.masks == "sample":
                mask[self.batch // 2] = False
            masks.append(mask if self.masks in (side, "both", "sample") else None)
        return {
            "kinds": self.kinds,
            "top_k": self.top_k,
            "mask_a": masks[0],
            "mask_b": masks[1],
            "temperature": self.temperature,
        }


def run(case: PairCase, inputs: list[Tensor], backend: str) -> list[Tensor]:
    """y, mass, and the gradients of both by all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    bias = leaves[4] if case.bias else None
    y, mass = pair_moe(
        *leaves[:4], gate_bias=bias, reduce=case.reduce, backend=backend, **case.options()
    )
    return [y.detach(), mass.detach(), *gradients([y, mass], leaves)]


def check(case: PairCase, dtype: torch.dtype, backend: str) -> list[list[Tensor]]:
    """Check all results; returns those of the backend, the reference and the oracle."""
    inputs = case.inputs(dtype)
    found = [
        run(case, inputs, backend),
        run(case, inputs, "reference"),
        run(case, as_dtype(inputs, torch.float64), "reference"),
    ]
    # With one expert the gate has no choice: its gradients are zero up to rounding.
    size = max((float(x.abs().max()) for x in found[2][2:] if x.numel()), default=0.0)
    for name, *triple in zip(NAMES, *found, strict=False):
        gradient = name.startswith("grad")
        largest = float(triple[2].abs().max()) if triple[2].numel() else 0.0
        assert_within_budget(
            *triple,
            f"{name} of {case} in {dtype}",
            magnitude=size if gradient else 0.0,
            may_vanish=gradient and largest < 0.1 * size,
        )
    return found


# Ragged and prime sizes, one token, no token, more than a block and a tile, wide and narrow.
SIZES = (
    PairCase(5, 7),
    PairCase(1, 1, 1, 1),
    PairCase(63, 60, 32, 64),
    PairCase(37, 131, 17, 65),
    PairCase(130, 1, 16, 16),
    PairCase(1, 130, 3, 40),
    PairCase(0, 3),
    PairCase(3, 0),
    PairCase(4, 3, batch=0),
    PairCase(196, 13, 4, 5, batch=3),
    PairCase(320, 61, 8, 9, batch=1),
)
KIND_LISTS = (
    *((kind,) for kind in KINDS),
    ("redundancy", "synergy"),
    ("null", "unique_b", "unique_a"),
    KINDS,
    ("synergy",) * 3 + ("null",) * 3,
    (*KINDS, "synergy", "null"),
    MANY,
)
