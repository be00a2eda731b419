"""Validated arguments of pair_moe, passed to all backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import statistics_dtype

# The positions are those of PairReduce in csrc/cpu/kernels.h.
REDUCE_NONE, REDUCE_EXPERTS, REDUCE_POOL = REDUCTIONS = ("none", "experts", "pool")


@dataclass(frozen=True)
class PairCall:
    """Inputs of pair_moe: q (B, E, La, R), k (B, E, Lb, R), a (B, E, La, V), c (B, E, Lb, V) with the same
    dtype, gate_bias (E) with this or the statistics dtype, mask_a (B, La) and mask_b (B, Lb) bool.

    kinds are positions in KINDS; top_k is 1..E; scale multiplies q . k.
    """

    q: Tensor
    k: Tensor
    a: Tensor
    c: Tensor
    gate_bias: Tensor | None
    mask_a: Tensor | None
    mask_b: Tensor | None
    kinds: tuple[int, ...]
    top_k: int
    scale: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.a, self.c, self.gate_bias, self.mask_a, self.mask_b

    @property
    def arguments(self) -> tuple:
        """Arguments of the operators."""
        return *self.tensors, self.kinds, self.top_k, self.scale

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def experts(self) -> int:
        return self.q.shape[1]

    @property
    def rows(self) -> int:
        """Tokens of side a, La."""
        return self.q.shape[2]

    @property
    def columns(self) -> int:
        """Tokens of side b, Lb."""
        return self.k.shape[2]

    @property
    def rank(self) -> int:
        return self.q.shape[3]

    @property
    def width(self) -> int:
        """Value width, V."""
        return self.a.shape[3]

    @property
    def statistics(self) -> torch.dtype:
        """Dtype of probabilities, mass and contributions: float64 for float64 inputs, otherwise float32."""
        return statistics_dtype(self.q.dtype)

    def y_dtype(self, reduce: str) -> torch.dtype:
        """The inputs' dtype; for "pool" `statistics`, because sums over all pairs would overflow float16."""
        return self.statistics if reduce == REDUCE_POOL else self.q.dtype

    def y_shape(self, reduce: str) -> tuple[int, ...]:
        batch, experts, rows, width = self.a.shape
        return {
            REDUCE_NONE: (batch, experts, rows, width),
            REDUCE_EXPERTS: (batch, rows, width),
            REDUCE_POOL: (batch, experts, width),
        }[reduce]
