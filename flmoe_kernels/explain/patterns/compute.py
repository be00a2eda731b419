"""Public functions `concentration` and `specificity` of attributions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.explain.attribution.values import Attribution

from . import measures
from .measures import pairs, require_top, top_tokens
from .results import ALL, PatternMeasures, joined, require_confidence

Attributions = Attribution | Iterable[Attribution]
MIXTURE, DENSE = "mixture", "dense"
CONCENTRATION, SPECIFICITY = "concentration", "specificity"


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

    settings = require_top(top), require_confidence(confidence)
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

    settings = require_top(top), require_confidence(confidence)
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
    """Check the attributions of batches; return a list."""
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
    """Measure the maps M x (B, R, L_m) in every scope."""
    scopes = {ALL: (torch.cat(list(maps), dim=2), torch.cat(attribution.valid, dim=1))}
    if len(maps) > 1:
        for m, of_modality in enumerate(zip(maps, attribution.valid, strict=True)):
            scopes[f"modality {m}"] = of_modality
    overlap = index == SPECIFICITY
    values = []
    near_ties = attribution.valid[0].new_zeros(len(attribution.valid[0]))
    for own, valid in scopes.values():
        importance = own.double().abs().masked_fill(~valid.unsqueeze(1), 0.0)
        chosen, tied = top_tokens(importance, valid, top)
        if overlap:
            values.append(measures.overlap_measures(importance, chosen))
            near_ties |= tied.any(dim=1)
        else:
            values.append(measures.concentration_measures(importance, valid, chosen))
    parts = [f"{names[e]} / {names[f]}" for e, f in zip(*pairs(len(names)), strict=True)]
    return PatternMeasures(
        index=index,
        measures=measures.OVERLAP if overlap else measures.CONCENTRATION,
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
