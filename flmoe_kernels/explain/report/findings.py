"""The results of the command `explain` for some samples, also as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels import __version__
from flmoe_kernels.core.figures import printable
from flmoe_kernels.explain.attribution.attribute import attribute
from flmoe_kernels.explain.attribution.values import Attribution
from flmoe_kernels.explain.estimators.indices import RG, SII
from flmoe_kernels.explain.estimators.interactions import probe_pairs
from flmoe_kernels.explain.estimators.results import PairValues
from flmoe_kernels.explain.estimators.run import Run
from flmoe_kernels.explain.estimators.sampling import Sampling
from flmoe_kernels.explain.games.tokens import candidates, token_means, valid_tokens
from flmoe_kernels.explain.masking.drops import MaskingDrops
from flmoe_kernels.explain.masking.faithfulness import faithfulness, pair_masking

from .features import Features
from .request import LABEL, PREDICTED, Request

KIND = "flmoe_kernels.explain report"
FORMAT = 1
INDICES = (SII, RG)
PACKAGES = ("torch", "numpy", "matplotlib")
OPEN, CLOSE = "\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}"
_LONGEST_TOKEN = 100
TOP_ROWS = 10  # pairs of a sample that the page lists; the file has all


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found about S samples.

    Attributes:
        request: what was asked.
        features: the S samples.
        layer: what the layer is, and how far it is from the reference, in JSON's types.
        logits: (S, C).
        expert_logits: (S, E, C).
        target: (S,) the class whose logit is explained.
        attribution: of all samples.
        pairs: of each sample by index.
        faithfulness: of the attribution.
        pair_masking: by index, of its largest pairs.
    """

    request: Request
    features: Features
    layer: dict[str, Any]
    logits: Tensor
    expert_logits: Tensor
    target: Tensor
    attribution: Attribution
    pairs: list[dict[str, PairValues]]
    faithfulness: MaskingDrops
    pair_masking: dict[str, MaskingDrops]

    @property
    def sources(self) -> dict[str, str]:
        """Names of the files that were read."""
        return {"checkpoint": self.request.checkpoint.name, "data": self.request.data.name}

    @property
    def predicted(self) -> list[int]:
        return [int(k) for k in self.logits.argmax(dim=1)]

    def label(self, sample: int) -> int | list[int] | None:
        """A class, the positive ones, or None."""
        labels = self.features.labels
        if labels is None:
            return None
        if labels.dim() == 1:
            return int(labels[sample])
        return [int(k) for k in labels[sample].nonzero()[:, 0]]

    def as_dict(self) -> dict[str, Any]:
        """All numbers in JSON's types; NaN and inf, which it does not have, are None."""
        whole = {
            "kind": KIND,
            "format": FORMAT,
            "versions": versions(),
            "request": self.request.as_dict(),
            "sources": self.sources,
            "layer": self.layer,
            "data": {
                "samples_in_file": self.features.total,
                "tokens_per_modality": list(self.features.lengths),
                "labels": None
                if self.features.labels is None
                else ("class", "multi-label")[self.features.labels.dim() - 1],
            },
            "experts": list(self.attribution.experts),
            "mean_expert_weights": self.attribution.weights.mean(dim=0).tolist(),
            "samples": [self._sample(s) for s in range(self.features.samples)],
            "faithfulness": _drops(self.faithfulness),
            "pair_masking": {name: _drops(x) for name, x in self.pair_masking.items()},
        }
        found: dict[str, Any] = _finite(whole)
        return found

    def _sample(self, s: int) -> dict[str, Any]:
        found = self.attribution
        return {
            "sample": s,
            "label": self.label(s),
            "predicted": self.predicted[s],
            "target": int(self.target[s]),
            "logits": self.logits[s].tolist(),
            "expert_logits": self.expert_logits[s].tolist(),
            "expert_weights": found.weights[s].tolist(),
            "attribution": {
                "valid": [x[s].tolist() for x in found.valid],
                "mixture": [x[s].tolist() for x in found.mixture],
                "experts": [x[s].tolist() for x in found.values],
            },
            "pairs": {name: values.to_dict() for name, values in self.pairs[s].items()},
        }


def find(
    layer: Any,
    whole: Features,
    request: Request,
    checkpoint: Path,
    about: dict[str, Any],
) -> Findings:
    """Explain the first samples with a layer in eval mode.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    features = whole.first(request.samples)
    given = (features.inputs, features.masks)
    with torch.no_grad():
        expert_logits, _, logits = layer.inference(*given)
    target = targets_of(request, features, logits)
    # With several labels a class is its own question: its probability is a sigmoid's.
    several = features.labels is not None and features.labels.dim() == 2
    asked = torch.nn.functional.one_hot(target, logits.shape[1]).bool() if several else target
    exempt = request.exempt
    candidates(valid_tokens(*given), exempt)  # before minutes of work
    baseline = None
    if request.fill == "mean":
        baseline = token_means([(whole.inputs, whole.masks)], exempt=exempt)
    value: dict[str, Any] = {"fill": request.fill, "baseline": baseline}
    found = attribute(layer, *given, method=request.attribution, target=asked)
    pairs = probe_pairs(
        layer,
        *given,
        indices=INDICES,
        target=target,
        pairs=request.pairs,
        scores=found.of(),
        top=request.top,
        method=request.method,
        sampling=Sampling(budget=request.budget, seed=request.seed),
        run=Run(checkpoint=checkpoint, progress=True),
        **value,
    )
    value |= {"n_random": request.repeats, "seed": request.seed, "exempt": exempt, "progress": True}
    drops = faithfulness(layer, *given, found, **value)
    masking = {
        name: pair_masking(layer, *given, [each[name] for each in pairs], target=asked, **value)
        for name in INDICES
    }
    return Findings(
        request=request,
        features=features,
        layer=about,
        logits=logits,
        expert_logits=torch.stack(expert_logits, dim=1),
        target=target,
        attribution=found,
        pairs=pairs,
        faithfulness=drops,
        pair_masking=masking,
    )


def targets_of(request: Request, features: Features, logits: Tensor) -> Tensor:
    """The class of each sample, (S,): asked for, its label, or predicted.

    Of several labels it is the positive one of largest logit; of none the largest logit.

    Raises:
        ValueError: no such class, or no labels where they are asked for.
    """
    labels, wanted = features.labels, request.target
    if wanted is None:
        wanted = PREDICTED if labels is None else LABEL
    if wanted == PREDICTED:
        return logits.argmax(dim=1)
    if wanted == LABEL:
        if labels is None:
            raise ValueError("target: expected labels in the file for 'label', got none")
        if labels.dim() == 1:
            return labels
        allowed = labels | ~labels.any(dim=1, keepdim=True)
        return logits.masked_fill(~allowed, -torch.inf).argmax(dim=1)
    if int(wanted) >= logits.shape[1]:
        raise ValueError(f"target: expected a class from 0 to {logits.shape[1] - 1}, got {wanted}")
    return torch.full((len(logits),), int(wanted))


def token_name(findings: Findings, sample: int, modality: int, position: int) -> str:
    """A token by its modality, position and, if known, its string, on one line and shortened."""
    strings = findings.features.tokens[modality]
    if strings is None:
        return f"{modality}:{position}"
    text = printable(str(strings[sample, position]))
    if len(text) > _LONGEST_TOKEN:
        text = text[: _LONGEST_TOKEN - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{modality}:{position} {OPEN}{text}{CLOSE}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "flmoe-kernels": __version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def json_text(findings: Findings) -> str:
    return json.dumps(findings.as_dict(), indent=1, allow_nan=False) + "\n"


def _drops(drops: MaskingDrops) -> dict[str, Any]:
    names = (
        "index",
        "unit",
        "budgets",
        "metrics",
        "multi_label",
        "seed",
        "evaluations",
        "settings",
    )
    return {
        **{name: getattr(drops, name) for name in names},
        "repeats": drops.random.shape[2],
        "masked": drops.masked.tolist(),
        "rows": drops.rows(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
