"""Accuracy, F1 and AUROC of logits, as the published code reports them."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.attribution.targets import require_labels, require_prediction
from flmoe_kernels.explain.extras import optional_package


class Performance(NamedTuple):
    """Metrics of a classifier's logits, from scikit-learn.

    accuracy: share of samples whose class, or whose whole set of labels, is right.
    micro_f1, macro_f1: F1 from the counts of all classes together; the mean over classes that occur in the labels
        or the predictions (for several labels: over all labels, 0 for one that never occurs).
    auroc: two classes: area under the ROC curve of class 1. More: the mean over pairs of classes ("ovo"). Several
        labels: the mean over labels. Classes without an area are left out; NaN if none is left.
    class_auroc: C areas, of each class against the rest; NaN for a class that no sample or every sample has.
    notes: which classes these are.
    """

    accuracy: float
    micro_f1: float
    macro_f1: float
    auroc: float
    class_auroc: tuple[float, ...]
    notes: tuple[str, ...]


def performance(logits: Tensor, labels: Any) -> Performance:
    """Accuracy, F1 and AUROC of logits (B, C): those of all samples, which are not means over batches.

    The prediction is the class of the largest logit or, for several labels, every label with sigmoid(z) > 1/2.

    Args:
        logits: (B, C).
        labels: (B,) classes, from two logits on; or (B, C) bool or 0/1 for several labels per sample. With (B, 1)
            the task is binary: F1 counts both values of the label.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        TypeError, ValueError: labels of another shape or range, NaN or inf in the logits, or no samples.
    """
    sklearn = optional_package("sklearn.metrics", package="scikit-learn")
    check.require_tensor("logits", logits)
    if logits.dim() != 2 or not len(logits):
        raise ValueError(f"logits: expected (B, C) with B > 0, got {tuple(logits.shape)}")
    batch, classes = logits.shape
    truth = require_labels("labels", labels, batch, classes, logits.device)
    require_prediction(logits)
    scores = logits.detach().double().cpu()
    several = truth.dim() == 2
    if several:
        # scikit-learn takes no infinity.
        guess, areas = scores > 0, scores.nan_to_num(neginf=torch.finfo(torch.float64).min)
    elif classes < 2:
        raise ValueError(
            f"logits: expected at least 2 classes for labels (B,), got {classes}; for the sigmoid of one logit "
            "pass labels (B, 1)"
        )
    else:
        guess, areas = scores.argmax(dim=1), scores.softmax(dim=1)
        if classes == 2:
            # Unlike probabilities, differences of logits do not saturate at 1.
            gap = (scores[:, 1] - scores[:, 0]).nan_to_num()
            areas = torch.stack([-gap, gap], dim=1)
    expected, predicted = truth.cpu().numpy(), guess.long().numpy()
    micro, macro = (
        float(sklearn.f1_score(expected, predicted, average=average, zero_division=0))
        for average in ("micro", "macro")
    )
    has, defined = _one_against_rest(truth, classes)
    by_class = tuple(
        float(sklearn.roc_auc_score(has[:, c].numpy(), areas[:, c].numpy())) if known else math.nan
        for c, known in enumerate(defined.tolist())
    )
    if not bool(defined.any()):
        auroc = math.nan
    elif several:
        auroc = statistics.fmean(area for area in by_class if not math.isnan(area))
    elif classes == 2:
        auroc = by_class[1]
    else:
        auroc = float(
            sklearn.roc_auc_score(
                expected, areas.numpy(), multi_class="ovo", labels=list(range(classes))
            )
        )
    accuracy = float(sklearn.accuracy_score(expected, predicted))
    return Performance(accuracy, micro, macro, auroc, by_class, area_notes(truth, classes))


def _one_against_rest(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Labels (B, C), and whether a class has an AUROC (C,): some samples, not all, are of the class."""
    has = (labels if labels.dim() == 2 else F.one_hot(labels, classes)).bool().cpu()
    return has, has.any(dim=0) & ~has.all(dim=0)


def area_notes(labels: Tensor, classes: int) -> tuple[str, ...]:
    """A note that names the classes without an area under the ROC curve."""
    missing = (~_one_against_rest(labels, classes)[1]).nonzero().flatten().tolist()
    if not missing:
        return ()
    return (
        f"no AUROC for {len(missing)} of {classes} classes ({', '.join(map(str, missing))}), which no sample or "
        "every sample has; means leave them out",
    )
