"""Public functions `concentration` and `specificity` of attributions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.attribution.values import Attribution
from flmoe_kernels.explain.games.tokens import percent_counts, places
from flmoe_kernels.explain.masking.measure import tied_tokens

from .results import ALL, NORMALIZED_ENTROPY, PatternMeasures, joined, require_confidence

Attributions = Attribution | Iterable[Attribution]
MIXTURE, DENSE = "mixture", "dense"
CONCENTRATION, SPECIFICITY = "concentration", "specificity"
_MEASURES = {
    CONCENTRATION: ("entropy", NORMALIZED_ENTROPY, "gini", "top_share"),
    SPECIFICITY: ("jaccard", "cosine"),
}


def concentration(
    attributions: Attributions, *, top: int | float = 0.1, confidence: float = 0.95
) -> PatternMeasures:
    """Measure how concentrated the importance of each expert is on few tokens.

    The importance of a token is the magnitude |value| of its attribution: the sign of a contribution says nothing
    about its size. Rollouts have no negative values. Of the n valid tokens, with shares p_i of the importance:

        entropy             -sum p_i ln p_i, in nats: 0 for one important token, ln n if all are equal
        normalized_entropy  entropy / ln n, from 0 to 1
        gini                sum (2 i - n - 1) p_(i) / n, p_(1) <= ... <= p_(n): 0 if all are equal, (n - 1) / n
                            for one important token
        top_share           sum of p_i over the top tokens

    Each measure is computed for every expert and, with two or more experts, for the mixture; over all tokens and
    for each modality. `PatternMeasures.minus` compares them with those of a dense Transformer: the concentration
    of `attribute(transformer, inputs, masks)` for the same inputs.

    Args:
        attributions: a result of `attribute`, or one for each batch of a data set. Use explains="expert" to
            measure experts apart from their weights in the mixture: the sizes of gradients affect the
            concentration of gradient rollouts.
        top: number of top tokens (int), or their share (float) of the n tokens, rounded up; equal tokens keep
            their order.
        confidence: of the intervals.

    Raises:
        TypeError, ValueError: an invalid argument, attributions of different models or methods, or NaN or inf in
            attributions.

    Cost: sorting B * E * L values.
    """

    settings = _require_top(top), require_confidence(confidence)
    found = []
    for attribution in _batches("attributions", attributions):
        names, maps = attribution.experts, attribution.values
        if len(names) > 1:
            names, maps = (*names, MIXTURE), _with(maps, attribution.mixture)
        found.append(_measured(attribution, CONCENTRATION, names, maps, *settings))
    return joined(found)


def specificity(
    attributions: Attributions,
    dense: Attributions | None = None,
    *,
    top: int | float = 0.1,
    confidence: float = 0.95,
) -> PatternMeasures:
    """Measure the overlap of the importance maps of experts; specific experts have little overlap.

    Importance: see `concentration`. Of each pair of experts, over all tokens and those of each modality:

        jaccard   size of the intersection of the two sets of top tokens / size of their union
        cosine    of the angle between the two vectors of importance

    Both are 1 for equal maps and 0 for maps without a common token. A model without experts has one map for all
    interactions, whose overlap with itself is 1.

    Args:
        attributions, top, confidence: see `concentration`.
        dense: attributions of another model, such as a dense Transformer, for the same samples. Its mixture map is
            used. Adds a pair of each expert and "dense".

    Raises:
        TypeError, ValueError: see `concentration`; one expert without `dense`, or `dense` of other tokens.

    Cost: see `concentration`.
    """

    settings = _require_top(top), require_confidence(confidence)
    batches = _batches("attributions", attributions)
    others: Sequence[Attribution | None] = [None] * len(batches)
    if dense is not None:
        others = _batches("dense", dense)
        if len(others) != len(batches):
            raise ValueError(f"dense: expected {len(batches)} batches, got {len(others)}")
    found = []
    for attribution, other in zip(batches, others, strict=True):
        names, maps = attribution.experts, attribution.values
        if other is not None:
            _require_same_tokens(attribution, other)
            names, maps = (*names, DENSE), _with(maps, other.mixture)
        if len(names) < 2:
            raise ValueError("attributions: expected at least two experts without dense, got one")
        found.append(_measured(attribution, SPECIFICITY, names, maps, *settings))
    return joined(found)


def _batches(name: str, attributions: Any) -> list[Attribution]:
    if isinstance(attributions, Attribution):
        attributions = [attributions]
    if not isinstance(attributions, Iterable):
        raise TypeError(
            f"{name}: expected an Attribution or an iterable of them, got {type(attributions).__name__}"
        )
    batches = list(attributions)
    if not batches:
        raise ValueError(f"{name}: expected at least one Attribution, got none")
    for i, each in enumerate(batches):
        if not isinstance(each, Attribution):
            raise TypeError(f"{name}[{i}]: expected an Attribution, got {type(each).__name__}")
        for what, own, first in (
            ("experts", each.experts, batches[0].experts),
            ("method", each.index, batches[0].index),
            ("explains", each.explains, batches[0].explains),
            ("settings", each.settings, batches[0].settings),
            ("modalities", len(each.valid), len(batches[0].valid)),
        ):
            if own != first:
                raise ValueError(
                    f"{name}[{i}]: expected the {what} of {name}[0], {first!r}, got {own!r}"
                )
        for values, valid in zip((*each.values, *each.mixture), each.valid * 2, strict=True):
            there = valid if values.dim() == 2 else valid.unsqueeze(1)
            if not bool((values.isfinite() | ~there).all()):
                raise ValueError(f"{name}[{i}]: expected finite values, got NaN or inf")
    return batches


def _require_same_tokens(attribution: Attribution, dense: Attribution) -> None:
    same = dense.index == attribution.index and dense.settings == attribution.settings
    if not same:
        raise ValueError(
            f"dense: expected the method {attribution.index} with {attribution.settings}, got "
            f"{dense.index} with {dense.settings}"
        )
    if len(attribution.valid) != len(dense.valid) or not all(
        torch.equal(mine, theirs.to(mine.device))
        for mine, theirs in zip(attribution.valid, dense.valid, strict=True)
    ):
        raise ValueError("dense: expected the tokens and masks of attributions, got different ones")


def _with(values: Sequence[Tensor], more: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Append maps M x (B, L_m) to the maps M x (B, E, L_m)."""
    return tuple(
        torch.cat([x, y.unsqueeze(1).to(x.device)], dim=1)
        for x, y in zip(values, more, strict=True)
    )


def _measured(
    attribution: Attribution,
    index: str,
    names: tuple[str, ...],
    maps: Sequence[Tensor],
    top: int | float,
    confidence: float,
) -> PatternMeasures:
    scopes = {ALL: (torch.cat(list(maps), dim=2), torch.cat(attribution.valid, dim=1))}
    if len(maps) > 1:
        for m, of_modality in enumerate(zip(maps, attribution.valid, strict=True)):
            scopes[f"modality {m}"] = of_modality
    overlap = index == SPECIFICITY
    values = []
    near_ties = attribution.valid[0].new_zeros(len(attribution.valid[0]))
    for own, valid in scopes.values():
        importance = own.double().abs().masked_fill(~valid.unsqueeze(1), 0.0)
        chosen, tied = _top_tokens(importance, valid, top)
        if overlap:
            values.append(_overlap(importance, chosen))
            near_ties |= tied.any(dim=1)
        else:
            values.append(_concentration(importance, valid, chosen))
    parts = [f"{names[e]} / {names[f]}" for e, f in zip(*_pairs(len(names)), strict=True)]
    return PatternMeasures(
        index=index,
        measures=_MEASURES[index],
        scopes=tuple(scopes),
        parts=tuple(parts) if overlap else names,
        values=torch.stack(values, dim=1),
        tokens=torch.stack([valid.sum(dim=1) for _, valid in scopes.values()]),
        near_ties=near_ties,
        top=top,
        confidence=confidence,
        method=attribution.index,
        settings=attribution.settings,
    )


def _require_top(top: object) -> int | float:
    """Return a count of tokens as an int, a share as a float. Raises TypeError or ValueError for others."""
    if isinstance(top, bool) or not isinstance(top, Real):
        raise TypeError(f"top: expected an int or a float, got {type(top).__name__}")
    if isinstance(top, Integral):
        check.require_count("top", int(top), 1)
        return int(top)
    if not 0.0 < float(top) <= 1.0:
        raise ValueError(f"top: expected a share above 0 up to 1, or a count (int), got {top}")
    return float(top)


def _top_tokens(importance: Tensor, valid: Tensor, top: int | float) -> tuple[Tensor, Tensor]:
    """Return the most important tokens (B, R, L) bool, and whether they were chosen among near-ties (B, R).

    importance (B, R, L) >= 0, valid (B, L) bool. Equal tokens keep their order.
    """
    if isinstance(top, int):
        counts = valid.sum(dim=1).clamp(max=top)
    else:
        counts = percent_counts(valid, 100 * Fraction(str(top)))
    allowed = valid.unsqueeze(1).expand_as(importance)
    chosen = places(importance, allowed) <= counts.view(-1, 1, 1)
    flat = [x.flatten(0, 1) for x in (importance, allowed, chosen)]
    tied = tied_tokens(flat[0], flat[1], flat[2].unsqueeze(0)).view(chosen.shape[:2])
    return chosen, tied & (importance > 0).any(dim=2)


def _concentration(importance: Tensor, valid: Tensor, chosen: Tensor) -> Tensor:
    """The measures (4, R, B) of importance (B, R, L) >= 0, which is 0 for padding; NaN if it is 0 everywhere."""
    count = valid.sum(dim=1, keepdim=True).double()
    shares = importance / importance.sum(dim=2, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(dim=2)
    # The rank among valid tokens, from 1; padding comes first, and has share 0.
    length = importance.shape[2]
    rank = torch.arange(1, length + 1, device=importance.device) - (length - count)
    weight = (2 * rank - count - 1).unsqueeze(1)
    gini = (shares.sort(dim=2)[0] * weight).sum(dim=2) / count
    top = torch.where(chosen, shares, 0.0).sum(dim=2)
    found = torch.stack([entropy, entropy / count.log(), gini, top])
    return found.masked_fill((importance == 0).all(dim=2), torch.nan).transpose(1, 2)


def _overlap(importance: Tensor, chosen: Tensor) -> Tensor:
    """The measures (2, P, B) of pairs of maps in importance (B, R, L) >= 0; NaN if one of them is 0 everywhere."""
    there = (importance != 0).any(dim=2)
    sets = chosen.double()
    common = sets @ sets.transpose(1, 2)
    size = sets.sum(dim=2)
    jaccard = common / (size.unsqueeze(2) + size.unsqueeze(1) - common)
    units = importance / torch.linalg.vector_norm(importance, dim=2, keepdim=True)
    cosine = units @ units.transpose(1, 2)
    both = there.unsqueeze(2) & there.unsqueeze(1)
    found = torch.stack([jaccard, cosine]).masked_fill(~both, torch.nan)
    first, second = _pairs(importance.shape[1])
    return found[:, :, first, second].transpose(1, 2)


def _pairs(count: int) -> tuple[list[int], list[int]]:
    """Positions e and f of the pairs e < f."""
    first, second = torch.triu_indices(count, count, 1).tolist()
    return first, second
