"""The command `explain`: from a checkpoint and encoded samples to a folder of results.

    python -m flmoe_kernels explain --checkpoint FILE --data FILE.npz --out DIR

Needs matplotlib (the extra "demo") and no network.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from flmoe_kernels.core.files import Content, write_whole
from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.published.convert import load_layer
from flmoe_kernels.published.file import CheckpointError
from flmoe_kernels.published.swap import swap

from .features import Features, load_features
from .findings import CHECKPOINTS, Findings, find
from .page import page
from .pictures import draw
from .request import Request
from .sentences import of_sample, overall

INTERRUPTED = 130
PAGE = "index.html"
# Every name that a run writes; no other file is replaced or removed.
_RESULT = re.compile(
    r"index\.html|explanation\.json|attribution\.npz|expert_weights\.png"
    r"|(?:faithfulness|pair_masking_(?:SII|RG))\.(?:npz|png)"
    r"|sample_\d{5,}_(?:SII|RG)(?:\.npz|_network\.png|_\d+_\d+\.png)"
)


class LayersDiffer(Exception):
    """The fast layer's outputs differ from the reference's; the message says which."""


def run(request: Request, *, force: bool = False) -> Findings:
    """Explain samples and write OUT/index.html, explanation.json, result files and figures.

    Results are written when all are complete, index.html last. Until then, OUT/checkpoints stores the progress of
    the pair estimates; the same request resumes from it, with the same numbers as without interruption.
    force: replace earlier results in the folder, which are otherwise an error; other files stay.

    Raises:
        CheckpointError, ValueError, OSError: the request cannot be run; the message is one line with the reason.
        LayersDiffer: the outputs of the swapped layer and the reference differ on these samples.
    """
    importlib.import_module("matplotlib")  # first, because the evaluations take minutes
    out = request.out
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: expected a folder, got a file")
    if not force and (results := _results(out)):
        raise ValueError(
            f"{out}: has results ({results[0].name}); use another folder, or replace them with --force"
        )
    fast, about, features = _load(request)
    if force:
        _clear_progress(out)
    findings = find(fast, features, request, about)
    with warnings.catch_warnings():
        # Characters missing in the font become boxes in figures; the page's tables have the text.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        pictures = draw(findings)
    files = _contents(findings) | {name: png for name, (png, _) in pictures.items()}
    files |= {PAGE: page(findings, pictures, list(files))}
    for path in _results(out):
        path.unlink()
    for name, content in files.items():
        write_whole(out / name, content, make_folder=True)
    _clear_progress(out)
    return findings


def main(request: Request, *, force: bool = False) -> int:
    """Run as a command; return 0: done, 1: layers differ, 2: the request cannot be run, 130: interrupted."""
    try:
        findings = run(request, force=force)
    except KeyboardInterrupt:
        message = "interrupted, without results; the same command without --force continues from "
        print(f"{message}{request.out / CHECKPOINTS}", file=sys.stderr)
        return INTERRUPTED
    except LayersDiffer as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for sentence in (overall(findings), *(of_sample(findings, s) for s in range(findings.samples))):
        print(sentence)
    print(f"Written: {PAGE}, explanation.json, results and figures in {request.out}")
    return 0


def _load(request: Request) -> tuple[Any, dict[str, Any], Features]:
    checkpoint, data = request.checkpoint, request.data
    reference = load_layer(checkpoint, **request.layer)
    spec = describe(reference)
    request.require_counts(spec.num_modalities, spec.num_classes)
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
    about = {
        "architecture": dict(sorted(dataclasses.asdict(spec).items())),
        "num_heads": spec.num_heads,
        "temperature": spec.temperature,
        "largest_logit_error_in_check": report.swapped[0].logits_error,
    }
    return report.model, about, features


def _contents(findings: Findings) -> dict[str, Content]:
    results: dict[str, Any] = {"attribution": findings.attribution, **findings.drops}
    for sample, values in enumerate(findings.pairs):
        results |= {f"sample_{sample:05d}_{name}": pairs for name, pairs in values.items()}
    files: dict[str, Content] = {f"{name}.npz": x.encoded() for name, x in results.items()}
    text = json.dumps(findings.as_dict(), indent=1, allow_nan=False)
    return {**files, "explanation.json": text + "\n"}


def _results(out: Path) -> list[Path]:
    found = [file for file in out.glob("*") if _RESULT.fullmatch(file.name)]
    return sorted(found, key=lambda file: (file.name != PAGE, file))


def _clear_progress(out: Path) -> None:
    folder = out / CHECKPOINTS
    for path in folder.glob("sample_*.npz"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
