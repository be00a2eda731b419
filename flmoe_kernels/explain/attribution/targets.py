"""The explained class of each sample, and the metrics of its logit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core import validation as check

PROB, LOG_PROB, LOGIT = METRICS = ("prob", "log_prob", "logit")


@dataclass(frozen=True, eq=False)
class Targets:
    """The explained classes of B samples."""

    weights: Tensor  # (B, C) float64, rows that sum to 1: one class, or 1 / n on each of n labels
    multi_label: bool  # whether classes are independent (sigmoid) or exclusive (softmax)

    def read(self, logits: Tensor, metric: str, samples: Tensor | None = None) -> Tensor:
        """A metric (N,) in float64 of logits (N, C); samples (N,) int64 are their samples, None for 0..B - 1.

        For the target class c, or averaged over the n positive labels c:

            logit       z_c
            prob        softmax(z)_c        sigmoid(z_c)
            log_prob    log softmax(z)_c    log sigmoid(z_c)

        The published evaluator clamps log sigmoid at log 1e-12; this one does not. Raises ValueError: another
        number of samples or classes than the targets', or the probability of a single class, which is constant.
        """
        weights = self.weights if samples is None else self.weights[samples]
        # A single column would be broadcast to all classes.
        check.require_shape(
            "logits", logits, tuple(weights.shape), "(samples, classes) as the targets"
        )
        if metric != LOGIT and weights.shape[1] == 1 and not self.multi_label:
            raise ValueError(
                "metrics: expected ('logit',) for a model with one class, whose probability is always 1 "
                f"(or multi_label=True, if it is the sigmoid of the logit), got {metric!r}"
            )
        z = logits.double()
        if metric == PROB:
            z = z.sigmoid() if self.multi_label else z.softmax(dim=1)
        elif metric == LOG_PROB:
            z = F.logsigmoid(z) if self.multi_label else z.log_softmax(dim=1)
        # A class of weight 0 contributes 0, even if its logit or log-probability is infinite.
        return torch.where(weights == 0, 0.0, z * weights).sum(dim=1)


def resolve_targets(target: Any, logits: Tensor, multi_label: bool = False) -> Targets:
    """Return the explained classes, from `target` and the logits of the unmasked inputs.

    Args:
        target: a class, any integer; (B,) integers, a class for each sample; (B, C) bool or 0/1, the positive
            labels of each sample (multi-label); None for the prediction: the class of the largest logit, or with
            multi_label the labels with sigmoid(z) >= 1/2. Tensors, numpy arrays or lists.
        logits: (B, C).
        multi_label: the meaning of None; a target (B, C) is always multi-label.

    For a multi-label sample without positive labels, the class of the largest logit is explained. Ties go to
    the lower class.
    """
    batch, classes = logits.shape
    likeliest = F.one_hot(_first_largest(logits), classes).double()
    if target is None:
        if not multi_label:
            return Targets(likeliest, False)
        positive = logits >= 0
    else:
        single = check.class_number("target", target) is not None
        require = check.require_classes if single else require_labels
        target = require("target", target, batch, classes, logits.device)
        if target.dim() == 1:
            if multi_label:
                raise ValueError(
                    "target: with multi_label expected labels (B, C), got classes (B,)"
                )
            return Targets(F.one_hot(target, classes).double(), False)
        positive = target == 1
    labels = torch.where(positive.any(dim=1, keepdim=True), positive.double(), likeliest)
    return Targets(labels / labels.sum(dim=1, keepdim=True), True)


def require_labels(name: str, value: Any, batch: int, classes: int, device: torch.device) -> Tensor:
    """Return classes (B,) or 0/1 labels (B, C), int64, of a tensor, a numpy array or a list, all checked."""
    labels = check.require_array(name, value, device)
    if labels.dim() == 1:
        return check.require_classes(name, labels, batch, classes, device)
    if labels.device != device:
        raise ValueError(f"{name}: expected device {device}, got {labels.device}")
    check.require_shape(name, labels, (batch, classes), "(B, C)")
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"{name}: expected labels 0 and 1 only, got other values")
    return (labels == 1).long()


def require_finite(values: Tensor, what: str, there: Tensor | None = None, first: int = 0) -> None:
    """Raise ValueError for NaN or inf in results (B, ...) of the samples `there`, numbered from `first`."""
    wrong = ~values.isfinite().flatten(1).all(dim=1)
    if there is not None:
        wrong &= there
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        value = float(values[place][~values[place].isfinite()][0])
        raise ValueError(f"model: expected finite {what}, got {value} for sample {first + place}")


def require_prediction(logits: Tensor, there: Tensor | None = None, first: int = 0) -> None:
    """Check logits (B, C) as `require_finite`; -inf is accepted, the logit of a class that is ruled out."""
    require_finite(logits.masked_fill(logits == -torch.inf, 0.0), "logits", there, first)


def require_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple. Raises ValueError: no name, an unknown name, or a duplicate."""
    known = f"some of {', '.join(METRICS)}"
    if isinstance(metrics, str):
        raise ValueError(
            f"metrics: expected a tuple of {known}, such as ('logit',), got {metrics!r}"
        )
    names = tuple(metrics) if isinstance(metrics, Iterable) else ()
    if not names:
        raise ValueError(f"metrics: expected {known}, got {metrics!r}")
    for name in names:
        check.require_choice("metrics", name, METRICS)
    if len(set(names)) < len(names):
        raise ValueError(f"metrics: expected no duplicates, got {', '.join(names)}")
    return names


def _first_largest(logits: Tensor) -> Tensor:
    """Index of the first largest logit; torch.argmax does not specify which of equal values it returns."""
    largest = logits.amax(dim=1, keepdim=True)
    return (logits == largest).to(torch.uint8).sort(dim=1, descending=True, stable=True)[1][:, 0]
