"""The experts of a model, and the experts of each modality pair."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flmoe_kernels.ops.pair_moe.kinds import NULL, REDUNDANCY, SYNERGY, UNIQUE_A, UNIQUE_B

# The experts with an interaction loss; each must occur once. Null experts have no loss.
_WITH_LOSSES = sorted((UNIQUE_A, UNIQUE_B, SYNERGY, REDUNDANCY))


@dataclass(frozen=True)
class ExpertTable:
    """Experts by name, and their positions in each pair of modalities.

    "unique_a" in pair (m, n) is the uniqueness expert of modality m, "unique_b" that of n; experts of
    other kinds are shared by all pairs.
    The names have uniqueness by modality first ("unique_0", "unique_1", ..), then the other kinds in the order of
    `kinds`; repeated kinds have the suffix "_2", "_3", ..
    """

    modalities: int
    kinds: tuple[str, ...]  # of one pair's experts
    pairs: tuple[tuple[int, int], ...]  # all (m, n) with m < n, in lexicographic order
    names: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]  # places[p][e]: position in `names` of expert e of pair p

    @classmethod
    def of(cls, modalities: int, kinds: Sequence[str]) -> ExpertTable:
        pairs = tuple(itertools.combinations(range(modalities), 2))
        copies = [kinds[: e + 1].count(kind) for e, kind in enumerate(kinds)]
        in_pairs = [
            [_name(kind, copy, m, n) for kind, copy in zip(kinds, copies, strict=True)]
            for m, n in pairs
        ]
        unique = {
            (copy, modality): _name(kind, copy, modality, modality)
            for m, n in pairs
            for kind, copy in zip(kinds, copies, strict=True)
            for side, modality in ((UNIQUE_A, m), (UNIQUE_B, n))
            if kind == side
        }
        shared = [
            name
            for kind, name in zip(kinds, in_pairs[0], strict=True)
            if kind not in (UNIQUE_A, UNIQUE_B)
        ]
        names = (*(unique[key] for key in sorted(unique)), *shared)
        places = tuple(tuple(names.index(name) for name in pair) for pair in in_pairs)
        return cls(modalities, tuple(kinds), pairs, names, places)

    def spread(self, x: Tensor, p: int, absent: float = 0) -> Tensor:
        """Expand x (B, E_pair, ...) of pair p to all experts (B, E, ...); `absent` for experts not in the pair."""
        present = dict(zip(self.places[p], x.unbind(1), strict=True))
        lacking = x.new_full((x.shape[0], *x.shape[2:]), absent)
        return torch.stack([present.get(e, lacking) for e in range(len(self.names))], dim=1)

    def with_losses(self) -> tuple[int, ...]:
        """Positions of the M + 2 experts with interaction losses: uniqueness x M, synergy, redundancy.

        Raises:
            ValueError: one of these kinds is missing or repeated.
        """
        if sorted(kind for kind in self.kinds if kind != NULL) != _WITH_LOSSES:
            raise ValueError(
                "interaction_losses: expected kinds with unique_a, unique_b, synergy and redundancy "
                f"once each (and any null), got {', '.join(self.kinds)}"
            )
        unique = [i for i, name in enumerate(self.names) if name.startswith("unique_")]
        return (*unique, self.names.index(SYNERGY), self.names.index(REDUNDANCY))


def _name(kind: str, copy: int, m: int, n: int) -> str:
    name = {UNIQUE_A: f"unique_{m}", UNIQUE_B: f"unique_{n}"}.get(kind, kind)
    return name if copy == 1 else f"{name}_{copy}"
