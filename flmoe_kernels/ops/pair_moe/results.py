"""Results of pair_moe and top_pairs, and their printed forms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Values whose difference is at most this share of the largest magnitude are near-ties.
NEAR_TIE = 0.05
_SHOWN_ROWS = 12


class PairMoEOutput(NamedTuple):
    """y: the accumulated messages, shaped by `reduce`; mass (B, E, La): the summed gate probabilities."""

    y: Tensor
    mass: Tensor

    def __repr__(self) -> str:
        return with_shapes(self)


class TopPairs(NamedTuple):
    """The largest pair contributions in descending order, ties by (i, j); -inf and -1 if fewer pairs are valid.

    values, i, j: (B, E, n), per expert. total_values, total_i, total_j: (B, n), for the sum over experts.
    near_ties (B, E), total_near_ties (B): bool, whether the first pair left out differs from the last one listed
    by at most NEAR_TIE of the largest magnitude listed, so that the choice between them means little.
    """

    values: Tensor
    i: Tensor
    j: Tensor
    total_values: Tensor
    total_i: Tensor
    total_j: Tensor
    near_ties: Tensor
    total_near_ties: Tensor

    def __repr__(self) -> str:
        if not isinstance(self.values, Tensor) or self.values.is_meta:
            return with_shapes(self)
        batch, experts, count = self.values.shape
        lines = [
            f"TopPairs({count} pairs for each of {batch} samples and {experts} experts, and for the "
            "experts' sum)",
            f"{'sample':>8}{'expert':>8}{'i':>8}{'j':>8}{'value':>14}",
        ]
        whole = (self.total_values, self.total_i, self.total_j)
        values, first, second = (
            torch.cat([total.unsqueeze(1), own], dim=1)
            for total, own in zip(whole, (self.values, self.i, self.j), strict=True)
        )
        rows = (first >= 0).nonzero()
        for sample, place, rank in rows[:_SHOWN_ROWS].tolist():
            at = (sample, place, rank)
            expert = str(place - 1) if place else "sum"
            lines.append(
                f"{sample:>8}{expert:>8}{int(first[at]):>8}{int(second[at]):>8}"
                f"{float(values[at]):>14.5g}"
            )
        if len(rows) > _SHOWN_ROWS:
            lines.append(f"... {len(rows) - _SHOWN_ROWS} more rows")
        ties = int(self.near_ties.sum()) + int(self.total_near_ties.sum())
        if ties:
            lines.append(
                f"note: in {ties} of {batch * (experts + 1)} lists the last pair is not "
                f"distinguishable from the first one left out (difference at most {NEAR_TIE:.0%} of "
                "the largest magnitude)"
            )
        return "\n".join(lines)


def near_ties(values: Tensor, count: int) -> Tensor:
    """Whether value `count` of (..., n) in descending order is a near-tie of the one before, (...) bool."""
    if values.shape[-1] <= count:
        return torch.zeros(values.shape[:-1], dtype=torch.bool, device=values.device)
    scale = values[..., :count].abs().amax(dim=-1)
    return values[..., count - 1] - values[..., count] <= NEAR_TIE * scale


def with_shapes(result: Any) -> str:
    """Printed form of a NamedTuple of tensors: names, shapes and dtypes."""
    fields = ", ".join(f"{name} {_shape(x)}" for name, x in result._asdict().items())
    return f"{type(result).__name__}({fields})"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shape, value))}]"
    return repr(value)
