"""Figures of the command `explain`: PNG files with captions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from flmoe_kernels.core.figures import png_bytes
from flmoe_kernels.explain.attribution.values import INTEGRATED
from flmoe_kernels.explain.estimators.indices import SII
from flmoe_kernels.explain.estimators.results import PairValues
from flmoe_kernels.explain.figures.canvas import short
from flmoe_kernels.explain.figures.curves import drop_curve
from flmoe_kernels.explain.figures.heat_map import token_patch_map
from flmoe_kernels.explain.figures.network import pair_network
from flmoe_kernels.explain.figures.weights import expert_weights

from .features import Features
from .findings import FAITHFULNESS, TOP_ROWS, Findings

Picture = tuple[bytes, str]  # PNG file and caption, which is also the alternative text


def draw(findings: Findings) -> dict[str, Picture]:
    """Draw all figures; return PNG files by name."""
    weights = expert_weights(findings.attribution.weights, findings.experts)
    pictures = {
        "expert_weights.png": (png_bytes(weights), "Weights of the experts in the mixture.")
    }
    for name, drops in findings.drops.items():
        index = name.rpartition("_")[2]
        what = f"of the pairs of largest {index}"
        if name == FAITHFULNESS:
            what = f"of highest attribution ({findings.attribution.index})"
        pictures[f"{name}.png"] = (
            png_bytes(drop_curve(drops, findings.metric, title=f"Tokens {what}")),
            f"Tokens {what} masked, or all others masked; compared with random tokens.",
        )
    for sample, values in enumerate(findings.pairs):
        for index, pairs in values.items():
            if np.isfinite(pairs.values).any():
                pictures |= _of_sample(findings, sample, index, pairs)
    return pictures


def _of_sample(
    findings: Findings, sample: int, index: str, values: PairValues
) -> Iterator[tuple[str, Picture]]:
    features = findings.features
    modalities = [findings.modality(m) for m in range(len(features.lengths))]
    tokens = [None if x is None else x[sample].tolist() for x in features.tokens]
    title = f"Sample {sample}: the strongest scored pairs by |{index}|"
    network = pair_network(values, TOP_ROWS, tokens=tokens, names=modalities, title=title)
    lines = "solid: above 0, dashed: below, dotted: tied across 0; width: |value|"
    stem = f"sample_{sample:05d}_{index}"
    yield f"{stem}_network.png", (png_bytes(network), f"{title}; {lines}.")
    for m, n in itertools.combinations(range(len(modalities)), 2):
        sides = _sides(features, m, n)
        # The image is the same for every index.
        for rows, columns in sides if index == SII else sides[:1]:
            if np.isnan(values.between(rows, columns)).all():
                continue
            images = features.images[columns] if index == SII else None
            image = None if images is None else images[sample]
            figure = _map(findings, sample, index, values, (rows, columns), tokens, image)
            over = "" if image is None else f"; below: attributions over {modalities[columns]}"
            caption = f"{index} of the scored pairs of {modalities[rows]} and {modalities[columns]}"
            yield f"{stem}_{rows}_{columns}.png", (png_bytes(figure), f"{caption}{over}.")


def _map(
    findings: Findings,
    sample: int,
    index: str,
    values: PairValues,
    sides: tuple[int, int],
    tokens: list[list[str] | None],
    image: Any,
) -> Any:
    rows, columns = sides
    result = findings.attribution
    # Not scaled to 0..1, which would show nearly equal values as the whole range of colours.
    own = result.of()[columns][sample].masked_fill(~result.valid[columns][sample], torch.nan)
    return token_patch_map(
        values.between(rows, columns),
        tokens[rows],
        image,
        errors=values.between(rows, columns, errors=True),
        patches=tokens[columns],
        weights=None if image is None else own,
        weights_label=result.index + " (logit)" * (result.index == INTEGRATED),
        title=f"Sample {sample}, {short(findings.class_name(int(findings.target[sample])))}: {index}",
        unit=f"{index} ({values.game.get('output', 'v')})",
        row_name=f"token of {short(findings.modality(rows))}",
        column_name=f"token of {short(findings.modality(columns))}",
    )


def _sides(features: Features, m: int, n: int) -> list[tuple[int, int]]:
    """Rows and columns of the maps of two modalities: each modality with an image is in the columns once."""
    both = [(m, n), (n, m)]
    return [sides for sides in both if features.images[sides[1]] is not None] or both[:1]
