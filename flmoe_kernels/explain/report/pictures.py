"""Figures of the command `explain`: PNG files with captions and alternative texts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flmoe_kernels.core.figures import png_bytes
from flmoe_kernels.explain.attribution.values import INTEGRATED
from flmoe_kernels.explain.estimators.indices import SII
from flmoe_kernels.explain.estimators.results import MAGNITUDE, PairValues, scored
from flmoe_kernels.explain.figures.canvas import short
from flmoe_kernels.explain.figures.curves import drop_curve
from flmoe_kernels.explain.figures.heat_map import token_patch_map
from flmoe_kernels.explain.figures.network import pair_network
from flmoe_kernels.explain.figures.weights import expert_weights
from flmoe_kernels.explain.masking.drops import KINDS, MaskingDrops

from .features import Features
from .findings import TOP_ROWS, Findings, token_name


@dataclass(frozen=True)
class Picture:
    """A figure's PNG file, its alternative text and its caption."""

    png: bytes
    alt: str
    caption: str


def draw(findings: Findings) -> dict[str, Picture]:
    """Draw all figures; return PNG files by name."""
    names, weights = findings.experts, findings.attribution.weights
    mean = weights.mean(dim=0).tolist()
    means = [f"{name} {value:.2f}" for name, value in zip(names, mean, strict=True)]
    pictures = {
        "expert_weights.png": Picture(
            png_bytes(expert_weights(weights, names)),
            f"Weights of the experts by sample, and their mean: {', '.join(means)}",
            "Weights of the experts in the mixture.",
        ),
        "faithfulness.png": Picture(
            _curve(findings, findings.faithfulness, f"Tokens by {findings.attribution.index}"),
            _in_numbers(findings, findings.faithfulness),
            "Tokens of highest attribution masked, or all others masked; compared with random tokens.",
        ),
    }
    for name, drops in findings.pair_masking.items():
        pictures[f"pair_masking_{name}.png"] = Picture(
            _curve(findings, drops, f"Tokens of the pairs of largest {name}"),
            _in_numbers(findings, drops),
            f"Tokens of the pairs of largest {name} masked, or all others; compared with random tokens.",
        )
    for sample, values in enumerate(findings.pairs):
        for name, pairs in values.items():
            if np.isfinite(pairs.values).any():
                pictures |= _of_sample(findings, sample, name, pairs)
    return pictures


def _of_sample(
    findings: Findings, sample: int, name: str, values: PairValues
) -> dict[str, Picture]:
    features = findings.features
    modalities = [findings.modality(m) for m in range(len(features.lengths))]
    tokens = [None if x is None else x[sample].tolist() for x in features.tokens]
    pairs = "pairs" if scored(values)[1] else "scored pairs"
    network = pair_network(
        values,
        TOP_ROWS,
        tokens=tokens,
        names=modalities,
        title=f"Sample {sample}: the strongest {pairs} by |{name}|",
    )
    count = min(TOP_ROWS, len(values))
    pictures = {
        f"sample_{sample:05d}_{name}_network.png": Picture(
            png_bytes(network),
            f"Lines between tokens, the widest for {_strongest(findings, sample, values)}.",
            f"The {count} strongest {pairs} by |{name}|; solid: above 0, dashed: below, dotted: tied across 0; "
            "width: |value|.",
        )
    }
    for m, n in itertools.combinations(range(len(modalities)), 2):
        sides = _sides(features, m, n)
        # The image is the same for every index.
        for rows, columns in sides if name == SII else sides[:1]:
            images = features.images[columns] if name == SII else None
            image = None if images is None else images[sample]
            pictures |= _map(findings, sample, name, values, (rows, columns), tokens, image)
    return pictures


def _map(
    findings: Findings,
    sample: int,
    name: str,
    values: PairValues,
    sides: tuple[int, int],
    tokens: list[list[str] | None],
    image: Any,
) -> dict[str, Picture]:
    rows, columns = sides
    between = values.between(rows, columns)
    if not (between == between).any():
        return {}
    first, second = findings.modality(rows), findings.modality(columns)
    result = findings.attribution
    # Not scaled to 0..1, which would show nearly equal values as the whole range of colours.
    own = result.of()[columns][sample].masked_fill(~result.valid[columns][sample], torch.nan)
    figure = token_patch_map(
        between,
        tokens[rows],
        image,
        errors=values.between(rows, columns, errors=True),
        patches=tokens[columns],
        weights=None if image is None else own,
        weights_label=result.index + " (logit)" * (result.index == INTEGRATED),
        title=f"Sample {sample}, {short(findings.class_name(int(findings.target[sample])))}: {name}",
        unit=f"{name} ({values.game.get('output', 'v')})",
        row_name=f"token of {short(first)}",
        column_name=f"token of {short(second)}",
    )
    over = "" if image is None else f"; below: attributions over the image of {second}"
    return {
        f"sample_{sample:05d}_{name}_{rows}_{columns}.png": Picture(
            png_bytes(figure),
            f"Heat map of {name} of the candidate pairs of {first} and {second}{over}.",
            f"{name} of all candidate pairs of {first} and {second}{over}.",
        )
    }


def _sides(features: Features, m: int, n: int) -> list[tuple[int, int]]:
    """Rows and columns of the maps of two modalities: each modality with an image is in the columns once."""
    both = [(m, n), (n, m)]
    return [sides for sides in both if features.images[sides[1]] is not None] or both[:1]


def _strongest(findings: Findings, sample: int, values: PairValues) -> str:
    best = values.top(3, MAGNITUDE)
    names = []
    for row in best.rows():
        i = token_name(findings, sample, row["modality_i"], row["token_i"])
        j = token_name(findings, sample, row["modality_j"], row["token_j"])
        names.append(f"{i} and {j} ({row['value']:+.3g})")
    return ", ".join(names)


def _curve(findings: Findings, drops: MaskingDrops, title: str) -> bytes:
    return png_bytes(drop_curve(drops, findings.metric, title=title))


def _in_numbers(findings: Findings, drops: MaskingDrops) -> str:
    parts = []
    for kind in KINDS:
        mean = drops.aopc(kind, findings.metric)
        parts.append(f"{kind} {float(mean.identified):.3g}, random {float(mean.random):.3g}")
    return f"Curves over the budgets, whose means are: {'; '.join(parts)}."
