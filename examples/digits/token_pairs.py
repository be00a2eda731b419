"""The layer over token pairs, with exact explanations of its predictions.

One pass gives the Shapley value of every patch and the interaction index of every pair of patches. The published
layer needs thousands of passes for an estimate of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels import PairInteractionMoE
from flmoe_kernels.explain.figures.weights import leading
from flmoe_kernels.layers.pair_interaction_moe.explanation import PairExplanation

from .data import Digits, Encoded, Pairs, Task
from .settings import Settings
from .train import accuracy, fit


@dataclass(frozen=True)
class PairResult:
    """Test accuracy of a trained layer, the experts' mean shares of the true class's logit (in the order of
    EXPERTS), the experts of largest share (several if tied), and the explanation of the first test sample."""

    accuracy: float
    share: tuple[float, ...]
    leading: tuple[int, ...]
    sample: dict[str, Any]


def make_layer(task: Task, settings: Settings) -> PairInteractionMoE:
    return PairInteractionMoE(
        (settings.width, settings.width),
        num_classes=task.num_classes,
        rank=settings.pair_rank,
        value_dim=settings.pair_value_dim,
        normalizer=settings.pair_normalizer,
    )


def train_layer(
    task: Task, pairs: Pairs, encoded: Encoded, settings: Settings
) -> PairInteractionMoE:
    """Train a new layer on cross entropy plus the weighted sum of the interaction losses."""
    torch.manual_seed(settings.seed)
    layer, weight = make_layer(task, settings), settings.pair_interaction_weight

    def loss_of(inputs: list[Tensor], labels: Tensor) -> Tensor:
        out = layer(inputs, interaction_losses=True)
        return F.cross_entropy(out.logits, labels) + weight * out.losses.sum()

    sizes = {"batch_size": settings.pair_batch_size, "steps": settings.pair_steps}
    fit(layer, loss_of, pairs, encoded, settings.seed, rate=settings.pair_learning_rate, **sizes)
    return layer


def evaluate(
    layer: PairInteractionMoE, pairs: Pairs, encoded: Encoded, digits: Digits
) -> PairResult:
    """Accuracy and shares over all pairs, and the explanation of the first pair."""
    explanation = layer.explain(pairs.batch(encoded, slice(None)), None, pairs.labels)
    share = explanation.expert_share()
    return PairResult(
        accuracy=accuracy(explanation.logits, pairs.labels),
        share=tuple(share.mean(dim=0).tolist()),
        leading=tuple(leading(share.double().numpy())),
        sample=explain_first(explanation, pairs, digits),
    )


def explain_first(explanation: PairExplanation, pairs: Pairs, digits: Digits) -> dict[str, Any]:
    """Plain values of the first pair, for the figure.

    `patches`: Shapley values of all patches per image; `pairs`: Shapley interaction indices of all
    pairs of patches, summed over the experts; `error`: |sum of values - (logit - logit without patches)|.
    """
    patches = explanation.shapley_values()
    total = sum(float(values[0].double().sum()) for values in patches)
    return {
        "digits": [int(digits.labels[index[0]]) for index in pairs.index],
        "images": [digits.images[index[0], 0].tolist() for index in pairs.index],
        "label": int(pairs.labels[0]),
        "guess": int(explanation.logits[0].argmax()),
        "patches": [values[0].tolist() for values in patches],
        "pairs": explanation.pair_map()[0].sum(dim=0).tolist(),
        "error": abs(total - float(explanation.value[0] - explanation.baseline[0])),
    }
