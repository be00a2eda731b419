"""The projected tokens of a pair of modalities, and the operators on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import statistics_dtype, without_autocast
from flmoe_kernels.ops.pair_moe.api import PairMoEOutput, TopPairs, pair_map, pair_moe, top_pairs
from flmoe_kernels.ops.pair_moe.kinds import swap_sides


@dataclass(frozen=True)
class Side:
    """One modality's tokens in one pair: packed (B, L, E, R + V), q|a or k|c; mask (B, L) bool or None.

    The last token is the modality's anchor. Slices are views.
    """

    packed: Tensor
    mask: Tensor | None
    rank: int

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        """Gate vectors (B, E, L, R) and values (B, E, L, V), strided views."""
        # Split before the transposition, so that the backward joins the two gradients in the
        # layout that the projection's backward reads.
        gate, value = self.packed.split((self.rank, self.packed.shape[3] - self.rank), dim=3)
        return gate.transpose(1, 2), value.transpose(1, 2)

    @property
    def tokens(self) -> Side:
        """This side without the anchor."""
        mask = None if self.mask is None else self.mask[:, :-1]
        return replace(self, packed=self.packed[:, :-1], mask=mask)

    @property
    def anchor(self) -> Side:
        """Only the anchor, which is never masked."""
        return replace(self, packed=self.packed[:, -1:], mask=None)


def join(sides: Sequence[Side]) -> Side:
    """Concatenate versions of one side along the batch."""
    masks = [side.mask for side in sides if side.mask is not None]
    packed = torch.cat([side.packed for side in sides])
    return Side(packed, torch.cat(masks) if masks else None, sides[0].rank)


@dataclass(frozen=True)
class ProjectedPair:
    """Both sides of a pair of modalities; gate: kinds, gate_bias and other keywords of pair_moe."""

    a: Side
    b: Side
    gate: dict[str, Any]

    def between(self, a: Side, b: Side) -> ProjectedPair:
        """The same pair with other tokens."""
        return ProjectedPair(a, b, self.gate)

    def swapped(self) -> ProjectedPair:
        """The same pair seen from side b; its experts keep their order."""
        gate = {**self.gate, "kinds": swap_sides(self.gate["kinds"])}
        return ProjectedPair(self.b, self.a, gate)

    def frozen(self) -> ProjectedPair:
        """A copy without autograd, in the statistics dtype, which later training steps do not change."""
        wide = statistics_dtype(self.a.packed.dtype)
        a, b = (replace(side, packed=side.packed.detach().to(wide)) for side in (self.a, self.b))
        bias = self.gate["gate_bias"].detach().to(wide, copy=True)
        return ProjectedPair(a, b, {**self.gate, "gate_bias": bias})

    def accumulate(self, reduce: str) -> PairMoEOutput:
        return pair_moe(*self._operands(), **self._options(), reduce=reduce)

    def map(self, head: Tensor, target: Tensor) -> Tensor:
        """phi (B, E, La, Lb) of class target (B) through head (E, V, C). Autocast is ignored."""
        with without_autocast(head.device):
            return pair_map(*self._operands(), head, **self._options(), target=target)

    def top(self, head: Tensor, target: Tensor, n_pairs: int) -> TopPairs:
        """The largest phi, see map."""
        options = {**self._options(), "target": target, "n_pairs": n_pairs}
        with without_autocast(head.device):
            return top_pairs(*self._operands(), head, **options)

    def _options(self) -> dict[str, Any]:
        return {**self.gate, "mask_a": self.a.mask, "mask_b": self.b.mask}

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (q, a), (k, c) = self.a.operands, self.b.operands
        return q, k, a, c
