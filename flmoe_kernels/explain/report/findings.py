"""Results of the command `explain`, also as JSON."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels import __version__
from flmoe_kernels.core.figures import printable
from flmoe_kernels.explain.attribution.attribute import attribute
from flmoe_kernels.explain.attribution.targets import LOGIT, METRICS
from flmoe_kernels.explain.attribution.values import Attribution
from flmoe_kernels.explain.estimators.candidates import SCREENED
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
FORMAT = 2  # 1 repeated the results of the .npz files
CHECKPOINTS, FAITHFULNESS = "checkpoints", "faithfulness"
INDICES = (SII, RG)
PACKAGES = ("torch", "numpy", "matplotlib")
OPEN, CLOSE = "\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}"
_LONGEST_TOKEN = 100
TOP_ROWS = 10  # pairs per sample that the page lists; the file has all pairs


@dataclass(frozen=True, eq=False)
class Findings:
    """Explanations of S samples."""

    request: Request
    features: Features
    layer: dict[str, Any]  # its description and its error against the reference, JSON serializable
    logits: Tensor  # (S, C)
    expert_logits: Tensor  # (S, E, C)
    target: Tensor  # (S,), the class whose logit is explained
    attribution: Attribution
    pairs: list[dict[str, PairValues]]  # of each sample, by index
    # "faithfulness", of the attribution, and "pair_masking_SII", "pair_masking_RG", of the largest pairs
    drops: dict[str, MaskingDrops]

    @property
    def samples(self) -> int:
        return self.features.samples

    @property
    def experts(self) -> list[str]:
        """Names of the experts; a uniqueness expert has its modality's name, if names are given."""
        names, known = list(self.attribution.experts), self.request.modality_names
        if known is not None:
            names[: len(known)] = [f"unique_{printable(x)}" for x in known]
        return names

    def modality(self, m: int) -> str:
        names = self.request.modality_names
        return f"modality {m}" if names is None else printable(names[m])

    def class_name(self, k: int) -> str:
        names = self.request.class_names
        return f"class {k}" if names is None else f"{OPEN}{printable(names[k])}{CLOSE}"

    @property
    def metric(self) -> str:
        """The metric of the drops that are shown: the probability, or the logit of a layer with one class."""
        return self.drops[FAITHFULNESS].metrics[0]

    @property
    def sources(self) -> dict[str, str]:
        """Names of the input files."""
        return {"checkpoint": self.request.checkpoint.name, "data": self.request.data.name}

    @property
    def predicted(self) -> list[int]:
        return [int(k) for k in self.logits.argmax(dim=1)]

    def token_name(self, sample: int, modality: int, position: int) -> str:
        """Name of a token: its modality, position and, if known, its string, on one line and shortened."""
        strings, names = self.features.tokens[modality], self.request.modality_names
        place = f"{modality if names is None else printable(names[modality])}:{position}"
        if strings is None:
            return place
        text = printable(str(strings[sample, position]))
        if len(text) > _LONGEST_TOKEN:
            text = text[: _LONGEST_TOKEN - 1] + "\N{HORIZONTAL ELLIPSIS}"
        return f"{place} {OPEN}{text}{CLOSE}"

    def pair_name(self, sample: int, place: int) -> str:
        """Names of the tokens of a pair, by its place in the sample's results."""
        values = self.pairs[sample][SII]
        tokens = values.tokens[values.pairs[place]].tolist()
        return " with ".join(self.token_name(sample, m, k) for m, k in tokens)

    def label(self, sample: int) -> int | list[int] | None:
        """Label of a sample: a class, a list of positive classes, or None."""
        labels = self.features.labels
        if labels is None:
            return None
        if labels.dim() == 1:
            return int(labels[sample])
        return [int(k) for k in labels[sample].nonzero()[:, 0]]

    def as_dict(self) -> dict[str, Any]:
        """Return the request, its sources and the layer's outputs as JSON types; the .npz files have the results.

        NaN and inf become None, because JSON does not have them.
        """
        labels, weights = self.features.labels, self.attribution.weights
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
                "labels": None if labels is None else ("class", "multi-label")[labels.dim() - 1],
            },
            "experts": list(self.attribution.experts),
            "mean_expert_weights": weights.mean(dim=0).tolist(),
            "samples": [
                {
                    "sample": s,
                    "label": self.label(s),
                    "predicted": self.predicted[s],
                    "target": int(self.target[s]),
                    "logits": self.logits[s].tolist(),
                    "expert_logits": self.expert_logits[s].tolist(),
                    "expert_weights": weights[s].tolist(),
                }
                for s in range(self.samples)
            ],
        }
        finite: dict[str, Any] = _finite(whole)
        return finite


def find(layer: Any, whole: Features, request: Request, about: dict[str, Any]) -> Findings:
    """Explain the first samples with a layer in eval mode; raises ValueError for an invalid request."""
    features = whole.first(request.samples)
    given = (features.inputs, features.masks)
    with torch.no_grad():
        expert_logits, _, logits = layer.inference(*given)
    target = targets_of(request, features, logits)
    # Multi-label classes are independent: the probability of a class is its sigmoid.
    multi = features.labels is not None and features.labels.dim() == 2
    classes = torch.nn.functional.one_hot(target, logits.shape[1]).bool() if multi else target
    exempt = request.exempt
    candidates(valid_tokens(*given), exempt)  # raises errors before minutes of work
    baseline = None
    if request.fill == "mean":
        baseline = token_means([(whole.inputs, whole.masks)], exempt=exempt)
    value: dict[str, Any] = {"fill": request.fill, "baseline": baseline}
    attribution = attribute(layer, *given, method=request.attribution, target=classes)
    sampling = Sampling(budget=request.budget, seed=request.seed)
    pairs = probe_pairs(
        layer,
        *given,
        indices=INDICES,
        target=target,
        pairs=request.pairs,
        scores=None if request.pairs == SCREENED else attribution.of(),
        top=None if request.pairs == SCREENED else request.top,
        method=request.method,
        sampling=sampling,
        run=Run(checkpoint=request.out / CHECKPOINTS),
        **value,
    )
    value |= {"n_random": request.repeats, "seed": request.seed, "exempt": exempt}
    # The probability of a single class is always 1.
    value["metrics"] = (LOGIT,) if logits.shape[1] == 1 and not multi else METRICS
    drops = {FAITHFULNESS: faithfulness(layer, *given, attribution, **value)}
    for name in INDICES:
        ranked = [x[name] for x in pairs]
        drops[f"pair_masking_{name}"] = pair_masking(layer, *given, ranked, target=classes, **value)
    return Findings(
        request=request,
        features=features,
        layer=about,
        logits=logits,
        expert_logits=torch.stack(expert_logits, dim=1),
        target=target,
        attribution=attribution,
        pairs=pairs,
        drops=drops,
    )


def targets_of(request: Request, features: Features, logits: Tensor) -> Tensor:
    """The explained class of each sample, (S,): the requested class, the label, or the predicted class.

    For multi-label samples it is the positive label of largest logit; without positive labels, the largest logit.
    Raises ValueError: no such class, or labels are requested but the file has none.
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


def versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "flmoe-kernels": __version__}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
