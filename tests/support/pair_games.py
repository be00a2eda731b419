"""Small games on pair layers by brute force; Shapley values by definition."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels import PairExplanation, PairInteractionMoE
from tests.support.explain_games import first_of
from tests.support.inputs import draw_masks
from tests.support.pair_layers import DIMS, pair_inputs, pair_layer

# Lengths, masks and options of games with 5 to 7 players.
GAMES: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "two modalities": ((2, 3), "none", {}),
    "three modalities": ((3, 2, 2), "none", {}),
    "masked": ((3, 2, 2), "padded_modality", {}),
    "top 2 with null": (
        (2, 3),
        "partial",
        {"kinds": ("unique_a", "null", "synergy", "unique_b", "redundancy"), "top_k": 2},
    ),
    "top 1 of repeated kinds": (
        (3, 2, 2),
        "none",
        {"kinds": ("synergy", "unique_b") * 2, "top_k": 1},
    ),
}


@dataclasses.dataclass(frozen=True)
class Game:
    """Logits of a sample on all coalitions: values (2^n, E + 1) by expert, the total last; bit i is token i."""

    layer: PairInteractionMoE
    inputs: list[Tensor]
    masks: list[Tensor | None]
    target: int
    values: Tensor

    @property
    def lengths(self) -> list[int]:
        return [x.shape[1] for x in self.inputs]

    @property
    def players(self) -> int:
        return sum(self.lengths)

    def explain(self) -> PairExplanation:
        return self.layer.explain(self.inputs, self.masks, self.target)


@cache
def game(name: str, backend: str, sample: int = 1) -> Game:
    """Brute force: a forward pass per coalition with all other tokens masked."""
    lengths, pattern, options = GAMES[name]
    layer = pair_layer(DIMS[: len(lengths)], backend=backend, **options)
    inputs = first_of(pair_inputs(lengths), sample)
    masks = first_of(draw_masks(pattern, 2, lengths) or [None] * len(lengths), sample)
    target = 2
    coalitions = torch.arange(2 ** sum(lengths))
    inside = ((coalitions[:, None] >> torch.arange(sum(lengths))) & 1).bool().split(lengths, dim=1)
    count = len(coalitions)
    there = [s if mask is None else s & mask.bool() for s, mask in zip(inside, masks, strict=True)]
    with torch.no_grad():
        out = layer([x.expand(count, -1, -1) for x in inputs], there)
    values = torch.cat([out.expert_logits[:, :, target], out.logits[:, target, None]], dim=1)
    return Game(layer, inputs, masks, target, values)


def explained_values(found: PairExplanation) -> Tensor:
    """(n, E + 1): Shapley values of all tokens of the sample, by expert and in total."""
    columns = [*range(len(found.experts)), None]
    return torch.stack([torch.cat(found.shapley_values(e), dim=1)[0] for e in columns], dim=1)


def explained_pairs(found: PairExplanation) -> Tensor:
    """(n, n, E + 1): interaction indices of all pairs of tokens of the sample."""
    places = torch.arange(sum(found.lengths)).split(list(found.lengths))
    whole = found.value.new_zeros(sum(found.lengths), sum(found.lengths), len(found.experts))
    for m, n in itertools.permutations(range(len(found.lengths)), 2):
        phi = found.pair_map(m, n)[0].permute(1, 2, 0)
        whole[places[m][:, None], places[n][None, :]] = phi
    return torch.cat([whole, whole.sum(dim=2, keepdim=True)], dim=2)
