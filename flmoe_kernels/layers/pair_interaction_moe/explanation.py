"""Exact explanations of a PairInteractionMoE from the terms of its game.

Let phi[i, j] be the contribution of a token pair to one logit, and S the set of tokens that are not masked out:

    v(S) = v(none) + sum over i in S of phi[i, anchors] + sum over i, j in S of phi[i, j]

In such a 2-additive game the Shapley interaction index of (i, j) is phi[i, j], and the Shapley value of i is
phi[i, anchors] plus half the sum of phi[i, j] over j (Grabisch and Roubens 1999: higher Moebius coefficients are
0). The same holds for each expert's part of the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.ops.pair_moe.call import REDUCE_NONE
from flmoe_kernels.ops.pair_moe.results import TopPairs

from .experts import ExpertTable
from .sides import ProjectedPair


@dataclass(frozen=True, eq=False, repr=False)
class PairExplanation:
    """Contributions of all tokens and token pairs to one logit per sample, by expert. No autograd graph.

    Values are in the statistics dtype, see PairOutput. The expert axis E has all experts of the layer, see
    `experts`; values are 0 for experts that a modality pair does not have, and for masked tokens.

    Attributes:
        experts: E names.
        lengths: L_m of each modality, 0 for a missing one.
        target: (B,) int64, the explained class.
        value: (B,) v(all): the target's logit.
        baseline: (B,) v(none): the logit with every token masked.
        logits: (B, C), the bias plus the sum of expert_logits.
        expert_logits: (B, E, C), the experts' parts of all logits.
        expert_baseline: (B, E), the experts' parts of the baseline, without the bias.
        token_index, pair_index: names of the indices, "SV" and "SII".
    """

    token_index: ClassVar[str] = "SV"
    pair_index: ClassVar[str] = "SII"

    experts: tuple[str, ...]
    lengths: tuple[int, ...]
    target: Tensor
    value: Tensor
    baseline: Tensor
    logits: Tensor
    expert_logits: Tensor
    expert_baseline: Tensor
    _anchored: tuple[Tensor, ...]  # (B, E, L_m): with the anchors of the other modalities
    _partnered: tuple[Tensor, ...]  # (B, E, L_m): sums over the other modalities' tokens
    _terms: _Terms

    def shapley_values(self, expert: str | int | None = None) -> list[Tensor]:
        """Shapley values (B, L_m) for each modality; over all tokens they sum to value - baseline.

        Args:
            expert: name or position, or None for the sum over all experts. The values of an expert sum to its
                column of expert_values().
        """
        both = zip(self._anchored, self._partnered, strict=True)
        values = [anchored + 0.5 * partnered for anchored, partnered in both]
        if expert is None:
            return [x.sum(dim=1) for x in values]
        place = self._place(expert)
        return [x[:, place] for x in values]

    def pair_map(self, m: int = 0, n: int = 1) -> Tensor:
        """Shapley interaction indices (B, E, L_m, L_n) of the tokens of two modalities, dense.

        Their sum over E is the index of the whole layer. Tokens of the same modality do not interact (index 0).
        """
        pair, p = self._between_tokens(m, n)
        terms = self._terms
        phi = pair.map(terms.head_of(p), self.target) / terms.normalizer
        return terms.table.spread(phi, p)

    def anchor_map(self, m: int) -> Tensor:
        """Contribution of each token of modality m without a partner, (B, E, L_m): phi[i, anchors]."""
        check.require_count("m", m, 0, len(self.lengths) - 1)
        return self._anchored[m].clone()

    def top_pairs(self, n_pairs: int, m: int = 0, n: int = 1, *, largest: bool = True) -> TopPairs:
        """The n_pairs largest interaction indices of two modalities; i is a token of m, j a token of n.

        No map is stored. Missing pairs, and experts that the modality pair does not have, have -inf and -1.

        Args:
            n_pairs: at least 1, and at most all pairs of tokens are returned, see the operator `top_pairs`.
            largest: False for the smallest (most negative) indices in ascending order, with inf instead of -inf.
        """
        check.require_count("n_pairs", n_pairs, 1)
        pair, p = self._between_tokens(m, n)
        terms, sign = self._terms, 1.0 if largest else -1.0
        top = pair.top(sign * terms.head_of(p), self.target, n_pairs)
        unit = sign / terms.normalizer
        return TopPairs(
            terms.table.spread(unit * top.values, p, -sign * torch.inf),
            terms.table.spread(top.i, p, -1),
            terms.table.spread(top.j, p, -1),
            unit * top.total_values,
            top.total_i,
            top.total_j,
            terms.table.spread(top.near_ties, p, False),
            top.total_near_ties,
        )

    def expert_values(self) -> Tensor:
        """The experts' parts of value - baseline, (B, E)."""
        return self._of_target() - self.expert_baseline

    def expert_share(self) -> Tensor:
        """Each expert's share of the decision, (B, E): |c_e| divided by the sum over experts.

        c_e is the expert's part of the target's logit minus its mean over the classes (a softmax depends only on
        this difference); with one class, its part of the logit. Zeros if no expert contributes.
        """
        part = self._of_target()
        if self.expert_logits.shape[2] > 1:
            part = part - self.expert_logits.mean(dim=2)
        size = part.abs()
        total = size.sum(dim=1, keepdim=True)
        return size / torch.where(total == 0, 1.0, total)

    def to_dict(self) -> dict[str, Any]:
        """Names, indices and values by expert and token in plain Python, ready for JSON."""
        return {
            "token_index": self.token_index,
            "pair_index": self.pair_index,
            "experts": list(self.experts),
            "tokens_per_modality": list(self.lengths),
            "target": self.target.tolist(),
            "value": self.value.tolist(),
            "baseline": self.baseline.tolist(),
            "expert_values": self.expert_values().tolist(),
            "expert_share": self.expert_share().tolist(),
            "shapley_values": [x.tolist() for x in self.shapley_values()],
        }

    def __repr__(self) -> str:
        modalities = ", ".join(f"{m}: {length} tokens" for m, length in enumerate(self.lengths))
        return (
            f"PairExplanation({self.token_index} of tokens and {self.pair_index} of token pairs, "
            f"{len(self.target)} samples; modalities {modalities}; experts {', '.join(self.experts)})"
        )

    def _place(self, expert: str | int) -> int:
        if isinstance(expert, str):
            if expert not in self.experts:
                raise ValueError(
                    f"expert: expected one of {', '.join(self.experts)}, got {expert!r}"
                )
            return self.experts.index(expert)
        check.require_count("expert", expert, 0, len(self.experts) - 1)
        return expert

    def _of_target(self) -> Tensor:
        """The experts' parts of the target's logit, (B, E)."""
        return self.expert_logits.take_along_dim(self.target[:, None, None], dim=2)[..., 0]

    def _between_tokens(self, m: int, n: int) -> tuple[ProjectedPair, int]:
        """The operands of modalities m (side a) and n without anchors, and the pair's position."""
        for name, value in (("m", m), ("n", n)):
            check.require_count(name, value, 0, len(self.lengths) - 1)
        if m == n:
            raise ValueError(f"n: expected a modality other than m = {m}, got {n}")
        p = self._terms.table.pairs.index((min(m, n), max(m, n)))
        pair = _without_anchors(self._terms.pairs[p])
        return (pair if m < n else pair.swapped()), p


@dataclass(frozen=True, eq=False)
class _Terms:
    """Operands and heads that the terms phi of the game are computed from."""

    pairs: tuple[ProjectedPair, ...]
    table: ExpertTable
    head: Tensor  # (E, V, C)
    normalizer: float

    def head_of(self, p: int) -> Tensor:
        """Heads of pair p's experts, (E_pair, V, C)."""
        return self.head[list(self.table.places[p])]

    def anchored(self, pair: ProjectedPair, p: int, target: Tensor) -> Tensor:
        """phi (B, E, La + 1) of side a's tokens and anchor with the anchor of side b."""
        phi = pair.between(pair.a, pair.b.anchor).map(self.head_of(p), target)
        return self.table.spread(phi[..., 0] / self.normalizer, p)

    def partnered(self, pair: ProjectedPair, p: int, target: Tensor) -> Tensor:
        """phi of side a's tokens summed over the tokens of side b, (B, E, La)."""
        y = _without_anchors(pair).accumulate(REDUCE_NONE).y
        weight = self.head_of(p).permute(2, 0, 1)[target]
        return self.table.spread(torch.einsum("beiv,bev->bei", y, weight) / self.normalizer, p)


def explain_pairs(
    pairs: Sequence[ProjectedPair],
    table: ExpertTable,
    head: Tensor,
    bias: Tensor,
    normalizer: float,
    expert_logits: Tensor,
    target: Tensor,
) -> PairExplanation:
    """Explain the class target (B) of the logits bias (C) + sum of expert_logits (B, E, C).

    All tensors are in the statistics dtype. They are kept, so the caller and the layer must not share them.
    """
    terms = _Terms(tuple(pairs), table, head, normalizer)
    anchored: list[list[Tensor]] = [[] for _ in range(table.modalities)]
    partnered: list[list[Tensor]] = [[] for _ in range(table.modalities)]
    anchors_alone = []
    for p, ((m, n), pair) in enumerate(zip(table.pairs, pairs, strict=True)):
        own, others = (terms.anchored(side, p, target) for side in (pair, pair.swapped()))
        anchors_alone.append(own[:, :, -1])
        anchored[m].append(own[:, :, :-1])
        anchored[n].append(others[:, :, :-1])
        partnered[m].append(terms.partnered(pair, p, target))
        partnered[n].append(terms.partnered(pair.swapped(), p, target))
    expert_baseline = torch.stack(anchors_alone).sum(dim=0)
    logits = bias + expert_logits.sum(dim=1)
    return PairExplanation(
        experts=table.names,
        lengths=tuple(x[0].shape[2] for x in anchored),
        target=target,
        value=logits.gather(1, target[:, None])[:, 0],
        baseline=bias[target] + expert_baseline.sum(dim=1),
        logits=logits,
        expert_logits=expert_logits,
        expert_baseline=expert_baseline,
        _anchored=tuple(torch.stack(x).sum(dim=0) for x in anchored),
        _partnered=tuple(torch.stack(x).sum(dim=0) for x in partnered),
        _terms=terms,
    )


def _without_anchors(pair: ProjectedPair) -> ProjectedPair:
    return pair.between(pair.a.tokens, pair.b.tokens)
