"""Findings in words, which state where a difference is uncertain."""

from __future__ import annotations

import numpy as np

from flmoe_kernels.explain.estimators.indices import SII
from flmoe_kernels.explain.estimators.results import PairValues
from flmoe_kernels.explain.figures.curves import METRIC_NAMES, compare
from flmoe_kernels.explain.figures.weights import FEW, leading
from flmoe_kernels.explain.masking.drops import COMPREHENSIVENESS
from flmoe_kernels.explain.reliability import LEAST_COUNT, TIE_ERRORS, tied

from .findings import FAITHFULNESS, Findings

# Share of |v|; smaller interactions may be rounding errors of float32 evaluations.
_ROUNDING = 1e-5


def overall(findings: Findings) -> str:
    """The finding of all samples in one sentence."""
    return f"{_experts(findings)}; {_masking(findings)}."


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
    values = findings.pairs[s][SII]
    if not np.isfinite(values.values).any():
        return "no pair of tokens was scored"
    best, others = strongest(values)
    error = float(values.standard_errors[best])
    how = f"standard error {error:.2g}" if error else "exact"
    how = how if np.isfinite(error) else "standard error unknown"
    pair = f"{findings.pair_name(s, best)} ({SII} {values.values[best]:+.3g}, {how})"
    if others < 0:
        return f"of the scored pairs none is distinguishable from 0; the largest is {pair}"
    if others:
        return f"of the scored pairs no single one is the strongest; {others} tied with {pair}"
    side = "more" if values.values[best] > 0 else "less"
    return (
        f"of the scored pairs the strongest is {pair}: together {side} than the sum of both alone"
    )


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


def _experts(findings: Findings) -> str:
    weights, names = findings.attribution.weights.cpu().double().numpy(), findings.experts
    best, *others = leading(weights)
    mean, count = weights.mean(axis=0), len(weights)
    if not others:
        over = f" on average over {count} samples" if count > 1 else ""
        return f"The expert {names[best]} has the largest weight, {mean[best]:.2f}{over}"
    shown = ", ".join(f"{names[k]} {mean[k]:.2f}" for k in (best, *others))
    if 1 < count < LEAST_COUNT:
        return f"The experts' mean weights over {count} samples are {FEW}: {shown}"
    return f"No expert has clearly the largest weight (tied: {shown})"


def _masking(findings: Findings) -> str:
    drops, metric = findings.drops[FAITHFULNESS], findings.metric
    mean, verdict = drops.aopc(COMPREHENSIVENESS, metric), compare(drops, COMPREHENSIVENESS, metric)
    text = (
        f"masking the tokens of highest attribution changes the {METRIC_NAMES[metric]} of the explained class by "
        f"{-float(mean.identified):+.2g}"
    )
    if not verdict:
        return f"{text} (not compared with random tokens)"
    return f"{text}, random tokens by {-float(mean.random):+.2g} ({verdict})"
