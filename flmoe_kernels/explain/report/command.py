"""The command `explain`: from a checkpoint and encoded samples to a folder of results.

    python -m flmoe_kernels explain --checkpoint FILE --data FILE.npz --out DIR

Needs matplotlib and tqdm (the extra "demo") and no network.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flmoe_kernels.core.figures import png_bytes
from flmoe_kernels.core.files import write_whole
from flmoe_kernels.explain.attribution.values import INTEGRATED
from flmoe_kernels.explain.estimators.indices import SII
from flmoe_kernels.explain.estimators.results import MAGNITUDE, PairValues
from flmoe_kernels.explain.figures.curves import drop_curve
from flmoe_kernels.explain.figures.heat_map import token_patch_map
from flmoe_kernels.explain.figures.network import pair_network
from flmoe_kernels.explain.figures.weights import expert_weights
from flmoe_kernels.explain.masking.drops import KINDS, MaskingDrops
from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.published.convert import load_layer
from flmoe_kernels.published.file import CheckpointError
from flmoe_kernels.published.swap import swap

from .features import Features, load_features
from .findings import TOP_ROWS, Findings, find, json_text
from .page import Picture, page, token_name
from .request import Request

INTERRUPTED = 130
EXTRAS = ("matplotlib", "tqdm")
CHECKPOINTS = "checkpoints"
_BANDS = "Bars: a standard error over samples, where there are several; band: a standard deviation over repeats."


class LayersDiffer(Exception):
    """The fast layer does not compute what the reference does; the message says where."""


def run(request: Request) -> Findings:
    """Explain samples and write OUT/index.html, explanation.json, the results' own files and the figures.

    Every file appears whole or not at all, index.html last. OUT/checkpoints keeps the progress of the pairs'
    estimates, from which the same request continues. Interruptions do not change the numbers.

    Raises:
        ModuleNotFoundError: an optional package is missing.
        CheckpointError, ValueError, OSError: the request cannot be met, with one line that says why.
        LayersDiffer: the swapped layer does not compute what the reference does on these samples.
    """
    # Before the evaluations, which take minutes.
    for name in EXTRAS:
        importlib.import_module(name)
    fast, about, features = _load(request)
    folder = request.out
    folder.mkdir(parents=True, exist_ok=True)
    found = find(fast, features, request, folder / CHECKPOINTS, about)
    files = _write_results(found, folder)
    with warnings.catch_warnings():
        # A script that the font lacks becomes boxes in a figure; the page's tables have the text.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        pictures = draw(found)
    for name, picture in pictures.items():
        write_whole(folder / name, picture.png)
    write_whole(folder / "index.html", page(found, pictures, [*files, *pictures]))
    return found


def main(request: Request) -> int:
    """Run as a command: 0 done, 1 the layers differ, 2 the request cannot be met, 130 interrupted.

    Raises:
        ModuleNotFoundError: an optional package is missing.
    """
    try:
        found = run(request)
    except KeyboardInterrupt:
        message = "interrupted: files already written are whole; the same command goes on from "
        print(f"{message}{request.out / CHECKPOINTS}", file=sys.stderr)
        return INTERRUPTED
    except LayersDiffer as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    for sample, values in enumerate(found.pairs):
        if len(values[SII]):
            console.print(f"sample {sample}, class {int(found.target[sample])}:", end=" ")
            table = values[SII].table(3, MAGNITUDE)
            console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print("Written: index.html, explanation.json, results and figures in", end=" ")
    console.print(str(request.out), markup=False, highlight=False, soft_wrap=True)
    return 0


def draw(found: Findings) -> dict[str, Picture]:
    """All figures as PNG files by name."""
    names = found.attribution.experts
    pictures = {
        "expert_weights.png": Picture(
            png_bytes(expert_weights(found.attribution.weights, names)),
            "Weights of the experts by sample, and their mean: "
            + _in_words(names, found.attribution.weights.mean(dim=0).tolist()),
            "What the mixture gives to each expert.",
        ),
        "faithfulness.png": Picture(
            png_bytes(drop_curve(found.faithfulness, title=f"Tokens by {found.attribution.index}")),
            _in_numbers(found.faithfulness),
            f"Tokens of highest attribution masked, or alone kept, next to random ones. {_BANDS}",
        ),
    }
    for name, drops in found.pair_masking.items():
        pictures[f"pair_masking_{name}.png"] = Picture(
            png_bytes(drop_curve(drops, title=f"Tokens of the pairs of largest {name}")),
            _in_numbers(drops),
            f"Tokens of the pairs of largest {name} masked, or alone kept, next to random ones. {_BANDS}",
        )
    for sample, values in enumerate(found.pairs):
        for name, each in values.items():
            if len(each):
                pictures |= _of_sample(found, sample, name, each)
    return pictures


def _of_sample(found: Findings, sample: int, name: str, values: PairValues) -> dict[str, Picture]:
    features = found.features
    tokens = [None if x is None else x[sample].tolist() for x in features.tokens]
    network = pair_network(
        values,
        TOP_ROWS,
        tokens=tokens,
        title=f"Sample {sample}: the strongest pairs by |{name}|",
    )
    count = min(TOP_ROWS, len(values))
    pictures = {
        f"sample_{sample:05d}_{name}_network.png": Picture(
            png_bytes(network),
            f"Lines between tokens, the widest for {_strongest(found, sample, values)}.",
            f"The {count} strongest pairs by |{name}|; solid: above 0, dashed: below, grey: within two standard "
            "errors of 0; widths are sizes.",
        )
    }
    for m, n in itertools.combinations(range(len(features.lengths)), 2):
        sides = _sides(features, m, n)
        # The image is the same for every index.
        for rows, columns in sides if name == SII else sides[:1]:
            images = features.images[columns] if name == SII else None
            image = None if images is None else images[sample]
            pictures |= _map(found, sample, name, values, (rows, columns), tokens, image)
    return pictures


def _map(
    found: Findings,
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
    weights, label = _over_image(found, sample, columns)
    figure = token_patch_map(
        between,
        tokens[rows],
        image,
        patches=tokens[columns],
        weights=None if image is None else weights,
        weights_label=label,
        title=f"Sample {sample}, class {int(found.target[sample])}: {name}",
        unit=f"{name} ({values.game.get('output', 'v')})",
        row_name=f"token of modality {rows}",
        column_name=f"token of modality {columns}",
    )
    over = "" if image is None else f"; right: attributions over the image of modality {columns}"
    return {
        f"sample_{sample:05d}_{name}_{rows}_{columns}.png": Picture(
            png_bytes(figure),
            f"Heat map of {name} of the candidate pairs of modalities {rows} and {columns}{over}.",
            f"{name} of all candidate pairs of modalities {rows} and {columns}{over}.",
        )
    }


def _over_image(found: Findings, sample: int, modality: int) -> tuple[Any, str]:
    """What the image shows of its patches, and what that is."""
    index = found.attribution.index
    if index == INTEGRATED:
        # They have a sign, and scaled the most negative would be 0.
        valid = found.attribution.valid[modality][sample]
        own = found.attribution.of()[modality][sample].masked_fill(~valid, torch.nan)
        return own, f"{index} (logit)"
    return found.attribution.normalized()[modality][sample], f"{index}, scaled from 0 to 1"


def _sides(features: Features, m: int, n: int) -> list[tuple[int, int]]:
    """Rows and columns of the maps of two modalities: each that has an image once in columns, as patches."""
    both = [(m, n), (n, m)]
    return [each for each in both if features.images[each[1]] is not None] or both[:1]


def _load(request: Request) -> tuple[Any, dict[str, Any], Features]:
    """The fast layer, its description in JSON's types, and the samples."""
    checkpoint, data = request.checkpoint, request.data
    reference = load_layer(checkpoint, **request.layer)
    spec = describe(reference)
    dtype = next(reference.parameters()).dtype
    features = load_features(data, spec.num_modalities, spec.hidden_dim, spec.num_classes, dtype)
    if spec.compat == "i2moe" and features.masks is not None:
        raise ValueError(
            f"{data}: masks_*: expected none for a layer with learned positions (I2MoE)"
        )
    few = features.first(request.samples)
    # The check draws noise: the file should hold the same numbers every time.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        report = swap(reference, inputs=(few.inputs,), masks=few.masks)
    if report.left:
        raise LayersDiffer(f"{checkpoint}: the fast layer was not taken: {report.left[0].reason}")
    architecture = dataclasses.asdict(spec)
    about = {
        "architecture": {name: architecture[name] for name in sorted(architecture)},
        "num_heads": spec.num_heads,
        "temperature": spec.temperature,
        "largest_logit_error_in_check": report.swapped[0].logits_error,
    }
    return report.model, about, features


def _write_results(found: Findings, folder: Path) -> list[str]:
    """The results' own files and the JSON; their names."""
    savers: dict[str, Any] = {
        "attribution.npz": found.attribution,
        "faithfulness.npz": found.faithfulness,
        **{f"pair_masking_{name}.npz": drops for name, drops in found.pair_masking.items()},
    }
    for sample, values in enumerate(found.pairs):
        savers |= {f"sample_{sample:05d}_{name}.npz": each for name, each in values.items()}
    for name, result in savers.items():
        result.save(folder / name)
    write_whole(folder / "explanation.json", json_text(found))
    return [*savers, "explanation.json"]


def _in_words(names: tuple[str, ...], values: list[float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in zip(names, values, strict=True))


def _strongest(found: Findings, sample: int, values: PairValues) -> str:
    best = values.top(3, MAGNITUDE)
    names = []
    for row in best.rows():
        i = token_name(found, sample, row["modality_i"], row["token_i"])
        j = token_name(found, sample, row["modality_j"], row["token_j"])
        names.append(f"{i} and {j} ({row['value']:+.3g})")
    return ", ".join(names)


def _in_numbers(drops: MaskingDrops) -> str:
    parts = []
    for kind in KINDS:
        mean = drops.aopc(kind)
        parts.append(f"{kind} {float(mean.identified):.3g}, random {float(mean.random):.3g}")
    return f"Curves over the budgets, whose means are: {'; '.join(parts)}."
