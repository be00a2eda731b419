"""Calls of expert_attention, and comparisons with the reference in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flmoe_kernels import expert_attention
from flmoe_kernels.core.error_budget import assert_within_budget
from tests.support.inputs import as_dtype, cumulative, draw, gradients, make_seed

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("out", "grad_q", "grad_k", "grad_v")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call with runs of these lengths, after `lead` and before `tail` uncovered rows."""

    lengths: tuple[int, ...]
    heads: int
    width: int
    p: float = 0.0
    groups: int | None = None
    lead: int = 0
    tail: int = 0
    scale: float | None = None

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.lengths)) or "none"
        rest = f"h{self.heads}d{self.width}p{self.p}"
        return f"{lengths}:{rest}" + (f"g{self.groups}" if self.groups is not None else "")

    @property
    def cu_seqlens(self) -> Tensor:
        return cumulative(self.lengths, self.lead)

    def qkv(self, dtype: torch.dtype) -> list[Tensor]:
        rows = self.lead + sum(self.lengths) + self.tail
        lead = () if self.groups is None else (self.groups,)
        shape = (*lead, rows, self.heads, self.width)
        return [draw(*shape, dtype=dtype, seed=i) for i in range(3)]


def run(
    case: Case,
    qkv: list[Tensor],
    backend: str,
    seed: int = 2**61 + 987654321,
    cu_seqlens: Tensor | None = None,
) -> list[Tensor]:
    """Output and gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    device = leaves[0].device
    runs = (case.cu_seqlens if cu_seqlens is None else cu_seqlens).to(device)
    options = {"dropout_p": case.p, "seed": make_seed(seed).to(device), "scale": case.scale}
    out = expert_attention(*leaves, runs, backend=backend, **options)
    return [out.detach(), *gradients([out], leaves)]


def check(
    case: Case, dtype: torch.dtype, backend: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Check that output and gradients are within the error budget; returns them with reference and oracle."""
    qkv = case.qkv(dtype)
    actual = run(case, qkv, backend)
    low = run(case, qkv, "reference")
    oracle = run(case, as_dtype(qkv, torch.float64), "reference")
    size = max((float(x.abs().max()) for x in oracle[1:] if x.numel()), default=0.0)
    for name, *found in zip(NAMES, actual, low, oracle, strict=True):
        # The gradients of q and k are differences, which are 0 if each problem has only one key.
        difference = name in ("grad_q", "grad_k")
        assert_within_budget(
            *found,
            f"{name} of {case} in {dtype}",
            magnitude=size if difference else 0.0,
            may_vanish=difference and max(case.lengths, default=0) < 3,
        )
    return actual, low, oracle


SMALL = (
    [Case((5, 1, 0, 7, 2), heads, 5, 0.5) for heads in range(1, 9)]
    + [Case((7, 0, 18), 2, width, 0.1) for width in (1, 3, 16, 17, 32, 64, 72, 128)]
    + [Case((7, 18), 1, 24, p) for p in (0.0, 0.1, 0.5, 0.999, 1.0)]
    + [Case((3, 0, 9), 2, 8, 0.5, groups) for groups in (1, 3)]
    + [
        Case((1,), 1, 1),
        Case((1, 1, 1), 3, 4),
        Case((0, 0, 3, 0), 2, 4),
        Case((4, 6), 2, 8, 0.5, groups=2, lead=3, tail=5),
        Case((4, 6), 2, 8, scale=0.7),
        Case((4, 6), 2, 8, scale=-1.5),
        Case((), 2, 8, tail=4),
        Case((), 2, 8, groups=2),
        Case((0,), 2, 8),
        Case((0, 0), 1, 3, groups=0),
    ]
)
LARGE = [
    Case((63, 60), 3, 17, 0.5),
    Case((196,), 2, 32, 0.1),
    Case((320, 1, 0, 127), 2, 16, 0.5),
    Case((128, 129, 131), 1, 9, 0.5),
    Case((385, 47, 49), 1, 5, 0.5, groups=2),
    Case((1100, 300, 100), 1, 5, 0.25),  # blocks forward; ranges backward, one empty
]
