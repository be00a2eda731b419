"""Masking by plain loops; a model whose drops encode the masked tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.explain.attribution.targets import METRICS
from tests.support.explain_games import first_of
from tests.support.layers import LayerCase

CASE = LayerCase((7, 5), batch=4, dim=8, heads=2, layers=1, classes=3, masks="partial")


BUDGETS = (10, 40.5, 100)


class TokenBits(torch.nn.Module):
    """A model whose first logit has a bit for every present token, so that drops encode the masked sets."""

    def forward(self, inputs: Any, masks: Any) -> Tensor:
        first = sum(x[:, :, 0].sum(dim=1) for x in inputs)
        return torch.stack([first, torch.zeros_like(first)], dim=1)


def bits(batch: int, lengths: Sequence[int]) -> list[Tensor]:
    """Inputs of TokenBits: token g has the value 2^g."""
    whole = (2.0 ** torch.arange(sum(lengths), dtype=torch.float64)).expand(batch, -1)
    return [x.unsqueeze(2).clone() for x in whole.split(list(lengths), dim=1)]


def set_of(drop: Tensor) -> set[int]:
    value = int(drop)
    assert value == float(drop)
    return {g for g in range(60) if value >> g & 1}


def reading(logits: Tensor, classes: list[int], multi_label: bool) -> dict[str, float]:
    """The three metrics of a sample's logits, class by class."""
    z = logits.tolist()
    total = sum(math.exp(x) for x in z)
    probs = [1 / (1 + math.exp(-x)) if multi_label else math.exp(x) / total for x in z]
    n = len(classes)
    return {
        "prob": sum(probs[c] for c in classes) / n,
        "log_prob": sum(math.log(probs[c]) for c in classes) / n,
        "logit": sum(z[c] for c in classes) / n,
    }


def masked_logits(
    logits_of: Any, inputs: list[Tensor], masks: Any, hidden: set[tuple[int, int]], fill: Any
) -> Tensor:
    """Logits of a sample with some (modality, token) masked."""
    inputs = [x.clone() for x in inputs]
    if fill == "drop":
        ones = [torch.ones(x.shape[:2], dtype=torch.bool) for x in inputs]
        masks = ones if masks is None else [x.clone() for x in masks]
    for m, i in hidden:
        if fill == "drop":
            masks[m][0, i] = 0
        else:
            mean = torch.zeros(8) if fill == "zero" else fill[m]
            inputs[m][0, i] = mean if mean.dim() == 1 else mean[i]
    return logits_of(inputs, masks)[0]


def brute_force(
    logits_of: Any,
    inputs: list[Tensor],
    masks: Any,
    attributions: list[Tensor],
    classes: list[list[int]],
    multi_label: bool,
    fill: Any,
    exempt: tuple[int, ...] = (),
) -> np.ndarray:
    """Definitions, one sample, budget and token at a time: (2, 3, B, K)."""
    found = np.zeros((2, 3, len(classes), len(BUDGETS)))
    for b, k in itertools.product(range(len(classes)), range(len(BUDGETS))):
        top, every = set(), set()
        for m, values in enumerate(attributions):
            valid = [i for i in range(values.shape[1]) if masks is None or masks[m][b, i]]
            if m in exempt and values.shape[1] > 1:
                valid = [i for i in valid if i != 0]
            count = max(1, math.ceil(Fraction(str(BUDGETS[k])) * len(valid) / 100))
            best = sorted(valid, key=lambda i, v=values: (-float(v[b, i]), i))[:count]
            top |= {(m, i) for i in best}
            every |= {(m, i) for i in valid}
        if not every:
            found[:, :, b, k] = np.nan
            continue
        one, mask = first_of(inputs, b), first_of(masks, b)
        whole = reading(masked_logits(logits_of, one, mask, set(), fill), classes[b], multi_label)
        for kind, hidden in enumerate((top, every - top)):
            left = masked_logits(logits_of, one, mask, hidden, fill)
            now = reading(left, classes[b], multi_label)
            found[kind, :, b, k] = [whole[metric] - now[metric] for metric in METRICS]
    return found
