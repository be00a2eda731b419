"""Public functions `faithfulness` and `pair_masking`: evaluation by masking."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.attribution.targets import (
    METRICS,
    Targets,
    require_labels,
    require_metrics,
    require_prediction,
    resolve_targets,
)
from flmoe_kernels.explain.attribution.values import Attribution
from flmoe_kernels.explain.estimators.candidates import listed_pairs
from flmoe_kernels.explain.estimators.results import LARGEST, PairValues
from flmoe_kernels.explain.games.coalitions import Floats, Ints
from flmoe_kernels.explain.games.masked import MaskedModel
from flmoe_kernels.explain.games.models import Inputs, describe
from flmoe_kernels.explain.games.tokens import (
    candidates,
    flat_places,
    percent_counts,
    places,
    players_of,
    valid_tokens,
)
from flmoe_kernels.explain.reliability import tied

from .drops import MaskingDrops
from .measure import draw_places, measure, tied_tokens

PERCENT, TOKENS = "percent", "tokens"
MAX_SEED = 2**64 - 1  # torch's generators take 64 bits
Pairs = Sequence[PairValues | Sequence[Sequence[Sequence[int]]]]


def faithfulness(
    model: Any,
    inputs: Inputs,
    masks: Inputs | None,
    attributions: Attribution | Sequence[Tensor | None],
    *,
    target: Any = None,
    multi_label: bool = False,
    budgets: Sequence[float] = (5, 10, 15, 20, 25),
    metrics: Sequence[str] = METRICS,
    fill: str = "zero",
    baseline: Sequence[Tensor | None] | None = None,
    exempt: Sequence[int] = (),
    expert: str | int | None = None,
    n_random: int = 10,
    seed: int = 0,
    labels: Any = None,
    max_batch: int | None = None,
    progress: bool | None = None,
) -> MaskingDrops:
    """Mask the top K percent of tokens of every modality, or all other tokens, and measure the target's drop.

    T has, of the n maskable tokens of a sample and modality, the ceil(n K / 100) tokens of highest attribution, at
    least one; ties go to the first. f is the target's probability, log-probability or logit:

        comprehensiveness = f(x) - f(x with T of all modalities masked)      large if T is important
        sufficiency       = f(x) - f(x with all but T masked)                small if T is sufficient

    AOPC is the mean over K. For comparison, the same is computed with n_random random attributions: each one is a
    random order of the tokens of every sample and modality.

    This is the masking evaluation of the published FL-I2MoE code, per modality, with its default budgets; with
    labels the result also reports accuracy, F1 and AUROC (`MaskingDrops.performance`). It masks with the mean
    token (fill="mean"). Evaluate a data set in batches and join the results: `MaskingDrops.concatenate`.
    Differences: ties are resolved (published: unspecified); random sets of a repeat are nested over budgets, as
    identified sets are (published: drawn anew for each K; sets are uniform in both); ceil has no rounding error;
    log-probabilities are not clamped; the explained class always comes from the unmasked samples.

    Args:
        model: see TokenGame.
        inputs, masks: M x (B, L_m, D_m), M x (B, L_m), see TokenGame.
        attributions: result of `attribute`, of which the mixture (or `expert`) is used; or M x (B, L_m), None for
            a missing modality. Finite at maskable tokens; other values are ignored.
        target, multi_label: see `resolve_targets`; None: the target of the Attribution or, for plain tensors, the
            model's prediction for the unmasked samples.
        budgets: K, increasing, above 0 and at most 100.
        metrics: names in METRICS.
        fill: replacement of masked tokens: "zero" or "mean" of the data set, both still attended; "drop" removes
            them from the masks.
        baseline: with fill "mean", M x (D_m,) or (L_m, D_m): see `token_means`.
        exempt: modalities whose token 0 is neither counted nor masked, such as the text encoder's first token.
        expert: evaluate the logits of this expert, by name or position.
        n_random, seed: number and seed of the random draws, which depend only on these and the shapes.
        labels: true classes (B,), or 0/1 labels (B, C) if targets are multi-label: the result keeps them and all
            logits. They do not change the explained class; to explain the true one pass them as `target`, too.
        max_batch: samples that the model evaluates at once; None: as the available memory allows; 1 if gates may
            drop tokens.
        progress: show a bar on standard error, with the number of evaluations; None: if it is a terminal.

    Raises:
        TypeError, ValueError: an invalid argument, a model that gives NaN or inf, or a probability of one class;
            the message says what was expected and what was passed.

    Cost: B (1 + 2 K (1 + n_random)) forward passes of one sample, in batches.
    Sources: arXiv 2603.13326; comprehensiveness, sufficiency and AOPC of DeYoung et al., arXiv 1911.03429.
    """
    steps = _require_budgets(budgets, PERCENT)
    check.require_count("n_random", n_random, 0)
    check.require_count("seed", seed, 0, MAX_SEED)
    wanted = require_metrics(metrics)
    masked = MaskedModel.of(model, inputs, masks, fill, baseline, expert, max_batch)
    candidate = candidates(valid_tokens(inputs, masks), exempt)
    values = _values_of(attributions, candidate, masked.expert)
    if target is None and isinstance(attributions, Attribution):
        targets = Targets(attributions.targets.to(masked.device), attributions.multi_label)
    else:
        targets = _resolved(target, masked, candidate, multi_label)
    classes = targets.weights.shape[1]
    if labels is not None:
        labels = require_labels("labels", labels, masked.samples, classes, masked.device)
        if (labels.dim() == 2) != targets.multi_label:
            kind = "(B, C), as targets are" if targets.multi_label else "(B,), as targets are not"
            raise ValueError(f"labels: expected {kind} multi-label, got {tuple(labels.shape)}")
    tied = torch.zeros((masked.samples, len(steps)), dtype=torch.bool, device=masked.device)
    chosen = []
    kept = 0 if labels is None else classes
    draws = draw_places(candidate, n_random, seed, len(steps), kept)
    for scores, allowed, drawn in zip(values, candidate, draws, strict=True):
        counts = torch.stack([percent_counts(allowed, percent) for percent in steps])
        order = torch.cat([places(scores, allowed).unsqueeze(0), drawn])
        chosen.append(order.unsqueeze(1) <= counts.unsqueeze(2))
        tied |= tied_tokens(scores, allowed, chosen[-1][0])
    by = attributions.index if isinstance(attributions, Attribution) else "given"
    about: dict[str, Any] = {"index": "faithfulness", "unit": PERCENT, "budgets": steps}
    about |= {"seed": int(seed), "near_ties": tied, "labels": labels}
    return _drops(masked, targets, wanted, chosen, candidate, progress, exempt, by, **about)


def pair_masking(
    model: Any,
    inputs: Inputs,
    masks: Inputs | None,
    pairs: Pairs,
    *,
    target: Any = None,
    multi_label: bool = False,
    budgets: Sequence[int] = (2, 4, 8),
    by: str = LARGEST,
    metrics: Sequence[str] = METRICS,
    fill: str = "zero",
    baseline: Sequence[Tensor | None] | None = None,
    exempt: Sequence[int] = (),
    expert: str | int | None = None,
    n_random: int = 10,
    seed: int = 0,
    max_batch: int | None = None,
    progress: bool | None = None,
) -> MaskingDrops:
    """Mask the tokens of the top pairs, or all other tokens, and measure the target's drop. See `faithfulness`.

    For a budget of t tokens, T is the union of pairs in their order. A pair that would exceed t is skipped; later
    pairs may still fit, for example if they share a token with T. If no pair fits, T has fewer than t tokens:
    `masked` has its size, and random sets have the same size.

    A random set is the union of random pairs, given that it has as many tokens of each modality as T. The
    distribution of uniformly drawn pairs does not change when a modality's tokens are permuted. Given these
    numbers, the union is therefore uniform among the token sets that have them, and is drawn so.

    Args:
        pairs: for each sample a PairValues, of `shapley_interactions` or `redundancy_gap`, or a list of
            ((m, i), (n, j)), token i of modality m with token j of modality n, the best first.
        target: None for the model's prediction for the unmasked samples.
        budgets: t, numbers of tokens, increasing.
        by: the order of a PairValues, "largest", "smallest" or "magnitude": synergy has a large SII,
            substitutes have a small SII and a large RG.
        exempt: modalities whose token 0 is never masked; pairs with it are skipped.
        Other arguments: as in `faithfulness`.

    Raises:
        TypeError, ValueError: an invalid argument; the message says what was expected and what was passed.
    """
    steps = _require_budgets(budgets, TOKENS)
    check.require_count("n_random", n_random, 0)
    check.require_count("seed", seed, 0, MAX_SEED)
    wanted = require_metrics(metrics)
    masked = MaskedModel.of(model, inputs, masks, fill, baseline, expert, max_batch)
    valid = valid_tokens(inputs, masks)
    candidate = candidates(valid, exempt)
    ranked = _ranked_pairs(pairs, valid, by)
    identified, tied = _unions(ranked, candidate, [int(t) for t in steps])
    targets = _resolved(target, masked, candidate, multi_label)
    chosen = []
    for union, order in zip(
        identified, draw_places(candidate, n_random, seed, len(steps)), strict=True
    ):
        drawn = order.unsqueeze(1) <= union.sum(dim=2, keepdim=True)
        chosen.append(torch.cat([union.unsqueeze(0), drawn]))
    names = sorted({x.index if isinstance(x, PairValues) else "given" for x in pairs})
    by = f"{by} {' and '.join(names)}"
    about: dict[str, Any] = {"index": "pair_masking", "unit": TOKENS, "budgets": steps}
    about |= {"seed": int(seed), "near_ties": tied}
    return _drops(masked, targets, wanted, chosen, candidate, progress, exempt, by, **about)


def _drops(
    masked: MaskedModel,
    targets: Targets,
    metrics: tuple[str, ...],
    chosen: Sequence[Tensor],
    candidate: Sequence[Tensor],
    progress: bool | None,
    exempt: Sequence[int],
    by: str,
    **about: Any,
) -> MaskingDrops:
    settings = {"exempt": [int(m) for m in exempt], "by": by}
    keep = about.get("labels") is not None
    return MaskingDrops(
        metrics=metrics,
        masked=sum((x[0].sum(dim=2) for x in chosen), start=torch.tensor(0)).T,
        maskable=sum((x.sum(dim=1) for x in candidate), start=torch.tensor(0)),
        targets=targets.weights,
        multi_label=targets.multi_label,
        batch_size=masked.max_batch,
        settings=describe(masked.model, masked.expert, masked.fill, **settings),
        **measure(masked, targets, metrics, chosen, candidate, progress, keep),
        **about,
    )


def _values_of(
    attributions: Attribution | Sequence[Tensor | None],
    candidate: Sequence[Tensor],
    expert: int | None,
) -> list[Tensor]:
    """Attributions M x (B, L_m), finite at the candidates; zeros elsewhere."""
    given: Any = attributions
    if isinstance(attributions, Attribution):
        # A loaded Attribution is on the CPU.
        given = [x.to(candidate[0].device) for x in attributions.of(expert)]
    if not isinstance(given, list | tuple) or len(given) != len(candidate):
        raise ValueError(f"attributions: expected {len(candidate)} Tensors, one for each modality")
    checked = []
    for m, (values, allowed) in enumerate(zip(given, candidate, strict=True)):
        name = f"attributions[{m}]"
        if values is None and not allowed.numel():
            values = allowed.new_zeros(allowed.shape, dtype=torch.float64)
        check.require_tensor(name, values)
        check.require_shape(name, values, tuple(allowed.shape), "(B, L_m)")
        if values.device != allowed.device:
            raise ValueError(f"{name}: expected device {allowed.device}, got {values.device}")
        values = values.detach().double().masked_fill(~allowed, 0.0)
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: expected finite values at valid tokens, got NaN or inf")
        checked.append(values)
    return checked


# Pairs (p, 2) of one sample, the best first, as positions in the concatenated modalities, and the keys and errors
# (p,) of a PairValues, in the same order; None for listed pairs.
_Ranked = tuple[Ints, tuple[Floats, Floats] | None]


def _resolved(
    target: Any, masked: MaskedModel, candidate: Sequence[Tensor], multi_label: bool
) -> Targets:
    logits = masked.full_logits()
    require_prediction(logits, torch.cat(list(candidate), dim=1).any(dim=1))
    return resolve_targets(target, logits, multi_label)


def _ranked_pairs(pairs: Any, valid: Sequence[Tensor], by: str) -> list[_Ranked]:
    batch, lengths = len(valid[0]), [x.shape[1] for x in valid]
    if not isinstance(pairs, list | tuple) or len(pairs) != batch:
        count = len(pairs) if isinstance(pairs, list | tuple) else type(pairs).__name__
        raise ValueError(f"pairs: expected a list for each of {batch} samples, got {count}")
    ranked = []
    for b, given in enumerate(pairs):
        tokens, scores = players_of(valid, b), None
        if isinstance(given, PairValues):
            order = given.ranked(by=by)
            scores = given.keys(by)[order], given.standard_errors[order]
            given = given.tokens[given.pairs[order]]
        places = flat_places(tokens, lengths)[listed_pairs(f"pairs[{b}]", given, tokens)]
        ranked.append((places, scores))
    return ranked


def _unions(
    ranked: Sequence[_Ranked], candidate: Sequence[Tensor], budgets: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """The tokens of the first pairs that fit each budget, M x (K, B, L_m) bool, and near-ties (B, K) bool."""
    allowed = torch.cat(list(candidate), dim=1).cpu().numpy()
    chosen = np.zeros((len(budgets), *allowed.shape), dtype=np.bool_)
    tied = np.zeros((len(ranked), len(budgets)), dtype=np.bool_)
    for b, own in enumerate(ranked):
        usable = np.flatnonzero(allowed[b][own[0]].all(axis=1)).tolist()
        for k, budget in enumerate(budgets):
            union, tied[b, k] = _union(own, usable, budget)
            chosen[k, b, sorted(union)] = True
    lengths, device = [x.shape[1] for x in candidate], candidate[0].device
    return (
        list(torch.from_numpy(chosen).to(device).split(lengths, dim=2)),
        torch.from_numpy(tied).to(device),
    )


def _union(ranked: _Ranked, usable: Sequence[int], budget: int) -> tuple[set[int], bool]:
    """Tokens of the pairs that fit, and whether a pair that does not is a near-tie of the last one that does."""
    pairs, scores = ranked
    union: set[int] = set()
    kept: int | None = None
    near = False
    for place in usable:
        pair = pairs[place].tolist()
        if len(union.union(pair)) <= budget:
            if not union.issuperset(pair):
                kept = place
            union.update(pair)
        elif kept is not None and scores is not None and not near:
            near = bool(tied(*scores, kept)[place])
    return union, near


def _require_budgets(budgets: Any, unit: str) -> tuple[float, ...]:
    if isinstance(budgets, np.ndarray):
        budgets = budgets.tolist()
    if not isinstance(budgets, list | tuple) or not budgets:
        raise ValueError(f"budgets: expected a list of numbers, got {budgets!r}")
    for budget in budgets:
        if unit == TOKENS:
            check.require_count("budgets", budget, 1)
            continue
        # numpy's numbers, too.
        if isinstance(budget, bool) or not isinstance(budget, Real):
            raise TypeError(f"budgets: expected numbers, got {type(budget).__name__}")
        if not 0 < float(budget) <= 100:
            raise ValueError(f"budgets: expected percentages above 0 up to 100, got {budget}")
    if any(low >= high for low, high in itertools.pairwise(budgets)):
        raise ValueError(f"budgets: expected increasing numbers, got {list(budgets)}")
    # Plain numbers, so that results can be written.
    return tuple(int(x) if isinstance(x, Integral) else float(x) for x in budgets)
