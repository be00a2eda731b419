"""The public functions `faithfulness` and `pair_masking`: does the model need the explained tokens?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.attribution.targets import (
    METRICS,
    Targets,
    require_metrics,
    resolve_targets,
)
from flmoe_kernels.explain.attribution.values import Attribution
from flmoe_kernels.explain.estimators.candidates import listed_pairs
from flmoe_kernels.explain.estimators.results import LARGEST, PairValues
from flmoe_kernels.explain.games.coalitions import Ints
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

from .drops import MaskingDrops, draw_places, measure

PERCENT, TOKENS = "percent", "tokens"
Pairs = Sequence[PairValues | Sequence[Sequence[Sequence[int]]]]


def faithfulness(
    model: Any,
    inputs: Inputs,
    masks: Inputs | None,
    attributions: Attribution | Sequence[Tensor | None],
    *,
    target: int | Tensor | None = None,
    multi_label: bool = False,
    budgets: Sequence[float] = (5, 10, 15, 20, 25),
    metrics: Sequence[str] = METRICS,
    fill: str = "zero",
    baseline: Sequence[Tensor | None] | None = None,
    exempt: Sequence[int] = (),
    expert: str | int | None = None,
    n_random: int = 10,
    seed: int = 0,
    max_batch: int | None = None,
    progress: bool = False,
) -> MaskingDrops:
    """Mask the top K percent of tokens of every modality, or all the others, and see what the target loses.

    Of a sample's n tokens of a modality that may be masked, T has the ceil(n K / 100) of highest attribution, at
    least one; of equal ones the first. With f the target's probability, log-probability or logit,

        comprehensiveness = f(x) - f(x with T of all modalities masked)      large where T is what counts
        sufficiency       = f(x) - f(x with all but T masked)                small where T is enough

    and AOPC the mean over K. Next to them the same with random attributions: n_random of them, each of which gives
    every sample and modality one random order of its tokens.

    This is the masking evaluation of the published FL-I2MoE code, per modality, with its default budgets. Where
    it departs: ties (there unspecified); random sets of one repeat are nested over budgets, as identified ones
    are (there drawn anew for each K; each set is uniform in both); ceil without the rounding of a product;
    log-probabilities without a floor; what is explained is always resolved on the unmasked samples.

    Args:
        model: see TokenGame.
        inputs, masks: M x (B, L_m, D_m), M x (B, L_m), see TokenGame.
        attributions: of `attribute`, whose mixture (or `expert`) is taken, or M x (B, L_m), None for a missing
            modality. Finite at the tokens that may be masked; what stands elsewhere does not matter.
        target, multi_label: see `resolve_targets`; None for what an Attribution explains, for plain tensors what
            the model predicts for the samples as they are.
        budgets: K, increasing, each above 0 and at most 100.
        metrics: of METRICS.
        fill: what masked tokens become, "zero", "mean" of the data set, both still attended, or "drop", out of
            the masks.
        baseline: with fill "mean", M x (D_m,) or (L_m, D_m): see `token_means`.
        exempt: modalities whose token 0 is neither counted nor masked: the text encoder's first token.
        expert: evaluate the logits of this expert, by name or position.
        n_random, seed: repeats of the random draw. The draws depend on these and the shapes alone.
        max_batch: samples that the model sees at once; None for what the memory at hand allows.
        progress: a bar on standard error, which needs tqdm.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Cost: B (1 + 2 K (1 + n_random)) forward passes of one sample, in batches.
    Sources: arXiv 2603.13326; comprehensiveness, sufficiency and AOPC of DeYoung et al., arXiv 1911.03429.
    """
    steps = _require_budgets(budgets, PERCENT)
    check.require_count("n_random", n_random, 0)
    check.require_count("seed", seed, 0)
    wanted = require_metrics(metrics)
    masked = MaskedModel.of(model, inputs, masks, fill, baseline, expert, max_batch)
    candidate = candidates(valid_tokens(inputs, masks), exempt)
    values = _values_of(attributions, candidate, masked.expert)
    if target is None and isinstance(attributions, Attribution):
        targets = Targets(attributions.targets.to(masked.device), attributions.multi_label)
    else:
        targets = resolve_targets(target, masked.full_logits(), multi_label)
    chosen = []
    for each, allowed, drawn in zip(
        values, candidate, draw_places(candidate, n_random, seed), strict=True
    ):
        counts = torch.stack([percent_counts(allowed, percent) for percent in steps])
        order = torch.cat([places(each, allowed).unsqueeze(0), drawn])
        chosen.append(order.unsqueeze(1) <= counts.unsqueeze(2))
    index = attributions.index if isinstance(attributions, Attribution) else "given"
    settings = {"exempt": list(exempt), "by": index}
    about: dict[str, Any] = {
        "index": "faithfulness",
        "unit": PERCENT,
        "budgets": steps,
        "seed": seed,
    }
    return _drops(masked, targets, wanted, chosen, candidate, progress, settings, **about)


def pair_masking(
    model: Any,
    inputs: Inputs,
    masks: Inputs | None,
    pairs: Pairs,
    *,
    target: int | Tensor | None = None,
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
    progress: bool = False,
) -> MaskingDrops:
    """Mask the tokens of the top pairs, or all the others, and see what the target loses. See `faithfulness`.

    Under a budget of t tokens T is the union of pairs taken whole in their order; a pair that would exceed t is
    passed over for later ones, which may share a token with T. Where the pairs run out before t tokens are used,
    or none fits the last place, T is smaller: `masked` says by how much, and random sets are as small.

    The random counterpart is the union of pairs drawn at random, given that it has as many tokens of each
    modality as T. Uniformly drawn pairs do not change in distribution when a modality's tokens are permuted, so
    that given those numbers the union is uniform among the token sets that have them, and is drawn as such.

    Args:
        pairs: of each sample a PairValues, of `shapley_interactions` or `redundancy_gap`, or a list of
            ((m, i), (n, j)), token i of modality m with token j of modality n, the best first.
        target: None for what the model predicts for the samples as they are.
        budgets: t, numbers of tokens, increasing.
        by: the order of a PairValues, "largest", "smallest" or "magnitude": synergy has a large SII,
            substitutes a small one and a large RG.
        exempt: modalities whose token 0 is never masked: pairs with it are passed over.
        (others): as `faithfulness`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    steps = _require_budgets(budgets, TOKENS)
    check.require_count("n_random", n_random, 0)
    check.require_count("seed", seed, 0)
    wanted = require_metrics(metrics)
    masked = MaskedModel.of(model, inputs, masks, fill, baseline, expert, max_batch)
    valid = valid_tokens(inputs, masks)
    candidate = candidates(valid, exempt)
    ranked = _ranked_pairs(pairs, valid, by)
    identified = _unions(ranked, candidate, [int(t) for t in steps])
    targets = resolve_targets(target, masked.full_logits(), multi_label)
    chosen = []
    for union, order in zip(identified, draw_places(candidate, n_random, seed), strict=True):
        drawn = order.unsqueeze(1) <= union.sum(dim=2, keepdim=True)
        chosen.append(torch.cat([union.unsqueeze(0), drawn]))
    names = sorted({x.index if isinstance(x, PairValues) else "given" for x in pairs})
    settings = {"exempt": list(exempt), "by": f"{by} {' and '.join(names)}"}
    about: dict[str, Any] = {
        "index": "pair_masking",
        "unit": TOKENS,
        "budgets": steps,
        "seed": seed,
    }
    return _drops(masked, targets, wanted, chosen, candidate, progress, settings, **about)


def _drops(
    masked: MaskedModel,
    targets: Targets,
    metrics: tuple[str, ...],
    chosen: Sequence[Tensor],
    candidate: Sequence[Tensor],
    progress: bool,
    settings: dict[str, Any],
    **about: Any,
) -> MaskingDrops:
    return MaskingDrops(
        metrics=metrics,
        masked=sum((x[0].sum(dim=2) for x in chosen), start=torch.tensor(0)).T,
        maskable=sum((x.sum(dim=1) for x in candidate), start=torch.tensor(0)),
        targets=targets.weights,
        multi_label=targets.multi_label,
        batch_size=masked.max_batch,
        settings=describe(masked.model, masked.expert, masked.fill, **settings),
        **measure(masked, targets, metrics, chosen, candidate, progress),
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
        # A loaded one is on the CPU.
        given = [x.to(candidate[0].device) for x in attributions.of(expert)]
    if not isinstance(given, list | tuple) or len(given) != len(candidate):
        raise ValueError(f"attributions: expected {len(candidate)} Tensors, one for each modality")
    found = []
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
        found.append(values)
    return found


def _ranked_pairs(pairs: Any, valid: Sequence[Tensor], by: str) -> list[Ints]:
    """For each sample the pairs (p, 2), the best first, as places in the concatenated modalities."""
    batch, lengths = len(valid[0]), [x.shape[1] for x in valid]
    if not isinstance(pairs, list | tuple) or len(pairs) != batch:
        count = len(pairs) if isinstance(pairs, list | tuple) else type(pairs).__name__
        raise ValueError(f"pairs: expected a list for each of {batch} samples, got {count}")
    found = []
    for b, given in enumerate(pairs):
        tokens = players_of(valid, b)
        if isinstance(given, PairValues):
            given = given.tokens[given.pairs[given.ranked(by=by)]]
        found.append(flat_places(tokens, lengths)[listed_pairs(f"pairs[{b}]", given, tokens)])
    return found


def _unions(
    ranked: Sequence[Ints], candidate: Sequence[Tensor], budgets: Sequence[int]
) -> list[Tensor]:
    """The tokens of the first pairs that fit each budget, M x (K, B, L_m) bool."""
    allowed = torch.cat(list(candidate), dim=1).cpu().numpy()
    chosen = np.zeros((len(budgets), *allowed.shape), dtype=np.bool_)
    for b, pairs in enumerate(ranked):
        usable = pairs[allowed[b][pairs].all(axis=1)].tolist()
        for k, budget in enumerate(budgets):
            chosen[k, b, sorted(_union(usable, budget))] = True
    lengths = [x.shape[1] for x in candidate]
    return list(torch.from_numpy(chosen).to(candidate[0].device).split(lengths, dim=2))


def _union(pairs: Sequence[Sequence[int]], budget: int) -> set[int]:
    union: set[int] = set()
    for pair in pairs:
        if len(union.union(pair)) <= budget:
            union.update(pair)
    return union


def _require_budgets(budgets: Any, unit: str) -> tuple[float, ...]:
    if not isinstance(budgets, list | tuple) or not budgets:
        raise ValueError(f"budgets: expected a list of numbers, got {budgets!r}")
    for budget in budgets:
        if unit == TOKENS:
            check.require_count("budgets", budget, 1)
            continue
        if isinstance(budget, bool) or not isinstance(budget, int | float):
            raise TypeError(f"budgets: expected numbers, got {type(budget).__name__}")
        if not 0 < budget <= 100:
            raise ValueError(f"budgets: expected percentages above 0 up to 100, got {budget}")
    if any(low >= high for low, high in itertools.pairwise(budgets)):
        raise ValueError(f"budgets: expected increasing numbers, got {list(budgets)}")
    return tuple(budgets)
