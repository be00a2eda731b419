"""Findings in words, which state where a difference is uncertain."""

from __future__ import annotations

import numpy as np

from flmoe_kernels.explain.estimators.indices import SII
from flmoe_kernels.explain.estimators.results import PairValues, scored
from flmoe_kernels.explain.figures.curves import (
    BETTER,
    METRIC_NAMES,
    UNCLEAR,
    UNKNOWN,
    WORSE,
    compare,
)
from flmoe_kernels.explain.figures.ties import groups
from flmoe_kernels.explain.figures.weights import FEW, leading
from flmoe_kernels.explain.games.coalitions import Floats, Ints
from flmoe_kernels.explain.masking.drops import COMPREHENSIVENESS
from flmoe_kernels.explain.reliability import LEAST_COUNT, TIE_ERRORS, tied

from .findings import Findings, token_name

# Share of |v|; smaller interactions may be rounding errors of float32 evaluations.
_ROUNDING = 1e-5
_VERDICTS = {
    BETTER: "a larger drop, as it should be",
    WORSE: "which is worse than random",
    UNCLEAR: "not distinguishable at two standard errors",
    UNKNOWN: f"a difference whose error is unknown (fewer than {LEAST_COUNT} samples)",
}


def overall(findings: Findings) -> str:
    """The finding of all samples in one sentence."""
    return f"{_experts(findings)}; {_masking(findings)}; {_pairs(findings)}."


def of_sample(findings: Findings, s: int) -> str:
    """The finding of a sample in one sentence."""
    return f"Sample {s}, {classes(findings, s)}: {interaction(findings, s)}."


def classes(findings: Findings, s: int) -> str:
    """The explained, the predicted and, if known, the labelled class of a sample."""
    label, name = findings.label(s), findings.class_name
    text = f"explained for {name(int(findings.target[s]))}, predicted {name(findings.predicted[s])}"
    if label is None:
        return text
    labels = label if isinstance(label, list) else [label]
    return f"{text}, label {' and '.join(map(name, labels)) or 'none'}"


def interaction(findings: Findings, s: int) -> str:
    """The strongest interaction of a sample, and whether it is distinguishable from the others and from 0."""
    count, whole = scored(findings.pairs[s][SII])
    if not count:
        return "no pair of tokens was scored"
    among = "" if whole else f"of the {count} scored pairs, " if count > 1 else "of 1 scored pair, "
    return among + _interaction(findings, s)


def _interaction(findings: Findings, s: int) -> str:
    values = findings.pairs[s][SII]
    best, others = strongest(values)
    if others < 0:
        return (
            f"no interaction is distinguishable from 0; the largest is {_pair(findings, s, best)}"
        )
    if not others:
        side = "more" if values.values[best] > 0 else "less"
        return (
            f"the strongest interaction is {_pair(findings, s, best)}: together {side} than the sum "
            "of both alone"
        )
    pairs = "another pair is" if others == 1 else f"{others} other pairs are"
    return f"no single interaction is the strongest; {pairs} tied with {_pair(findings, s, best)}"


def strongest(values: PairValues) -> tuple[int, int]:
    """Return the place of the pair of largest |value| that is distinguishable from 0, and the number of pairs tied
    with it; or the largest of all, and -1, if none is distinguishable from 0."""
    sizes = np.nan_to_num(np.abs(values.values))
    errors = values.standard_errors
    least = _ROUNDING * max(abs(values.value), abs(values.baseline))
    clear = sizes > np.maximum(TIE_ERRORS * errors, least)
    if not clear.any():
        return int(sizes.argmax()), -1
    best = int(np.where(clear, sizes, -1.0).argmax())
    return best, int(tied(sizes, errors, best).sum()) - 1


def ranks(values: Floats, errors: Floats) -> list[str]:
    """The rank of each value by size; tied values, directly or through others, share it.

    "-" for NaN; "?" for a value of unknown (NaN) error, which has no rank and links no others.
    """
    known = np.isfinite(values) & ~np.isnan(errors)
    group = groups(np.abs(values[known]), errors[known])
    count: Ints = np.bincount(group, minlength=1)
    first = count.cumsum() - count + 1
    spans = [
        f"{k}" if n == 1 else f"{k}\N{EN DASH}{k + n - 1}"
        for k, n in zip(first, count, strict=True)
    ]
    found = np.where(np.isnan(values), "-", "?").astype(object)
    found[known] = [spans[k] for k in group]
    return [str(x) for x in found]


def _experts(findings: Findings) -> str:
    weights, names = findings.attribution.weights.cpu().double().numpy(), findings.experts
    best, *others = leading(weights)
    mean = weights.mean(axis=0)
    count = len(weights)
    if not others:
        over = f" on average over {count} samples" if count > 1 else ""
        return f"The expert {names[best]} has the largest weight, {mean[best]:.2f}{over}"
    shown = ", ".join(f"{names[k]} {mean[k]:.2f}" for k in (best, *others))
    if 1 < count < LEAST_COUNT:
        return f"The experts' mean weights over {count} samples are {FEW}: {shown}"
    return f"No expert has clearly the largest weight (tied: {shown})"


def _masking(findings: Findings) -> str:
    shown = (COMPREHENSIVENESS, findings.metric)
    mean, verdict = findings.faithfulness.aopc(*shown), compare(findings.faithfulness, *shown)
    text = (
        f"masking the tokens of highest attribution changes the {METRIC_NAMES[findings.metric]} of the explained "
        f"class by {-float(mean.identified):+.2g}"
    )
    if not verdict:
        return f"{text} (not compared with random tokens)"
    return f"{text}, random tokens by {-float(mean.random):+.2g}, {_VERDICTS[verdict]}"


def _pairs(findings: Findings) -> str:
    if findings.samples == 1:
        return interaction(findings, 0)
    values = [x[SII] for x in findings.pairs]
    count = sum(bool(np.isfinite(x.values).any()) and strongest(x)[1] == 0 for x in values)
    among = "" if all(scored(x)[1] for x in values) else "among the scored pairs, "
    return f"{among}one pair of tokens clearly interacts most in {count or 'none'} of {len(values)} samples"


def _pair(findings: Findings, s: int, place: int) -> str:
    values = findings.pairs[s][SII]
    i, j = (token_name(findings, s, m, k) for m, k in values.tokens[values.pairs[place]].tolist())
    error = float(values.standard_errors[place])
    how = f"standard error {error:.2g}" if error else "exact"
    how = how if np.isfinite(error) else "standard error unknown"
    return f"{i} with {j} ({SII} {values.values[place]:+.3g}, {how})"
