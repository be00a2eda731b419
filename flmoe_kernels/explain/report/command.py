"""The command `explain`: from a checkpoint and encoded samples to a folder of results.

    python -m flmoe_kernels explain --checkpoint FILE --data FILE.npz --out DIR

Needs matplotlib (the extra "demo") and no network.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flmoe_kernels.core.files import write_whole
from flmoe_kernels.explain.estimators.indices import SII
from flmoe_kernels.explain.estimators.results import MAGNITUDE
from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.published.convert import load_layer
from flmoe_kernels.published.file import CheckpointError
from flmoe_kernels.published.swap import swap

from .features import Features, load_features
from .findings import Findings, find, json_text
from .page import page
from .pictures import draw
from .request import Request

INTERRUPTED = 130
EXTRAS = ("matplotlib",)
CHECKPOINTS = "checkpoints"


class LayersDiffer(Exception):
    """The fast layer's outputs differ from the reference's; the message says which."""


def run(request: Request) -> Findings:
    """Explain samples and write OUT/index.html, explanation.json, result files and figures.

    Every file is written atomically, index.html last. OUT/checkpoints keeps the progress of the pair estimates;
    the same request continues from it, with the same numbers as an uninterrupted run.

    Raises:
        ModuleNotFoundError: an optional package is missing.
        CheckpointError, ValueError, OSError: the request cannot be run; the message is one line with the reason.
        LayersDiffer: the outputs of the swapped layer and the reference differ on these samples.
    """
    # Imported first, because the evaluations take minutes.
    for name in EXTRAS:
        importlib.import_module(name)
    fast, about, features = _load(request)
    folder = request.out
    folder.mkdir(parents=True, exist_ok=True)
    findings = find(fast, features, request, folder / CHECKPOINTS, about)
    files = _write_results(findings, folder)
    with warnings.catch_warnings():
        # Characters missing in the font become boxes in figures; the page's tables have the text.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        pictures = draw(findings)
    for name, picture in pictures.items():
        write_whole(folder / name, picture.png)
    write_whole(folder / "index.html", page(findings, pictures, [*files, *pictures]))
    return findings


def main(request: Request) -> int:
    """Run as a command; return 0: done, 1: layers differ, 2: the request cannot be run, 130: interrupted.

    Raises:
        ModuleNotFoundError: an optional package is missing.
    """
    try:
        findings = run(request)
    except KeyboardInterrupt:
        message = "interrupted: written files are complete; the same command continues from "
        print(f"{message}{request.out / CHECKPOINTS}", file=sys.stderr)
        return INTERRUPTED
    except LayersDiffer as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    for sample, values in enumerate(findings.pairs):
        if len(values[SII]):
            console.print(f"sample {sample}, class {int(findings.target[sample])}:", end=" ")
            table = values[SII].table(3, MAGNITUDE)
            console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print("Written: index.html, explanation.json, results and figures in", end=" ")
    console.print(str(request.out), markup=False, highlight=False, soft_wrap=True)
    return 0


def _load(request: Request) -> tuple[Any, dict[str, Any], Features]:
    """Load the fast layer, its description (JSON serializable) and the samples."""
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
    # The check draws noise; seeded, so that the file has the same numbers every time.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        report = swap(reference, inputs=(few.inputs,), masks=few.masks)
    if report.left:
        raise LayersDiffer(f"{checkpoint}: the fast layer was not used: {report.left[0].reason}")
    architecture = dataclasses.asdict(spec)
    about = {
        "architecture": {name: architecture[name] for name in sorted(architecture)},
        "num_heads": spec.num_heads,
        "temperature": spec.temperature,
        "largest_logit_error_in_check": report.swapped[0].logits_error,
    }
    return report.model, about, features


def _write_results(findings: Findings, folder: Path) -> list[str]:
    """Write the result files and the JSON file; return their names."""
    savers: dict[str, Any] = {
        "attribution.npz": findings.attribution,
        "faithfulness.npz": findings.faithfulness,
        **{f"pair_masking_{name}.npz": drops for name, drops in findings.pair_masking.items()},
    }
    for sample, values in enumerate(findings.pairs):
        savers |= {f"sample_{sample:05d}_{name}.npz": pairs for name, pairs in values.items()}
    for name, result in savers.items():
        result.save(folder / name)
    write_whole(folder / "explanation.json", json_text(findings))
    return [*savers, "explanation.json"]
