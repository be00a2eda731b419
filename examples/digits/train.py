"""Training the reference layer on one task, and what the trained model relies on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flmoe_kernels.layers.interaction_moe.reference import (
    FusionTransformer,
    ReferenceInteractionMoE,
)

from .data import EXPERTS, Encoded, Pairs, Task
from .settings import Settings

EVALUATION_BATCH = 250
WARM_UP = 0.2
LARGEST_GRADIENT = 1.0


class PairClassifier(nn.Module):
    """A model with the interaction layer inside, as a user's model has it: what `swap` is given."""

    def __init__(self, num_classes: int, settings: Settings) -> None:
        super().__init__()
        fusion = FusionTransformer(
            num_modalities=2,
            hidden_dim=settings.width,
            output_dim=num_classes,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            dropout=settings.dropout,
        )
        self.layer = ReferenceInteractionMoE(
            num_modalities=2,
            fusion_model=fusion,
            hidden_dim=settings.width,
            hidden_dim_rw=settings.width,
            temperature_rw=settings.temperature,
        )

    def forward(self, inputs: list[Tensor], masks: list[Tensor], **options: Any) -> tuple:
        return self.layer(inputs, masks, **options)

    def inference(
        self, inputs: list[Tensor], masks: list[Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        return self.layer.inference(inputs, masks)


def total_loss(outputs: tuple, labels: Tensor, interaction_weight: float) -> Tensor:
    """The task's cross entropy plus the weighted sum of the experts' interaction losses."""
    _, _, logits, losses, *_ = outputs
    return F.cross_entropy(logits, labels) + interaction_weight * torch.stack(losses).sum()


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[list[Tensor], list[Tensor], Tensor],
    interaction_weight: float,
) -> Tensor:
    """One step on (inputs, masks, labels): forward, losses, backward, clipping, update."""
    inputs, masks, labels = batch
    loss = total_loss(model(inputs, masks), labels, interaction_weight)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    return loss.detach()


def train(task: Task, pairs: Pairs, encoded: Encoded, settings: Settings) -> PairClassifier:
    """Train a fresh reference model on a task."""
    torch.manual_seed(settings.seed)
    return fit(PairClassifier(task.num_classes, settings), task, pairs, encoded, settings)


def fit(
    model: PairClassifier, task: Task, pairs: Pairs, encoded: Encoded, settings: Settings
) -> PairClassifier:
    """Train a model, its layer the reference's or the fast one; shows a progress bar on a terminal."""
    from tqdm import tqdm

    model.train()
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=WARM_UP
    )
    steps = tqdm(range(settings.steps), desc=f"train {task.name:9}", unit="step", disable=None)
    for _ in steps:
        rows = torch.randint(len(pairs), (settings.batch_size,), generator=generator)
        batch = (*pairs.batch(encoded, rows), pairs.labels[rows])
        loss = training_step(model, optimizer, batch, settings.interaction_weight)
        schedule.step()
        steps.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode and records no gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Predictions:
    """Everything that a model says about some pairs: logits (S, C), weights (S, E), and the logits
    (S, E, C) of each expert."""

    logits: Tensor
    weights: Tensor
    expert_logits: Tensor

    def accuracy(self, labels: Tensor) -> float:
        return _accuracy(self.logits, labels)


def predict(model: PairClassifier, pairs: Pairs, encoded: Encoded) -> Predictions:
    """Run a model on all pairs, full view only."""
    logits, weights, expert_logits = [], [], []
    with evaluating(model):
        for start in range(0, len(pairs), EVALUATION_BATCH):
            inputs, masks = pairs.batch(encoded, slice(start, start + EVALUATION_BATCH))
            experts, weight, mixture = model.inference(inputs, masks)
            logits.append(mixture)
            weights.append(weight)
            expert_logits.append(torch.stack(list(experts), dim=1))
    return Predictions(torch.cat(logits), torch.cat(weights), torch.cat(expert_logits))


@dataclass(frozen=True)
class Reliance:
    """How much a model leans on each expert, in the order of EXPERTS.

    Attributes:
        weight: mean weight of the mixture.
        share: mean share of an expert in the sum over experts of |weight * logits|, logits taken
            relative to their mean over classes, which is all that a softmax sees of them.
        without: accuracy when the expert's term is taken out of the mixture.
        alone: accuracy of the expert's own logits.
    """

    weight: tuple[float, ...]
    share: tuple[float, ...]
    without: tuple[float, ...]
    alone: tuple[float, ...]

    @property
    def most(self) -> dict[str, str]:
        """The expert relied on most: by share, by weight, and by the accuracy lost without it."""
        measures = {
            "share": self.share,
            "weight": self.weight,
            "accuracy_lost": tuple(-accuracy for accuracy in self.without),
        }
        return {name: EXPERTS[values.index(max(values))] for name, values in measures.items()}


def reliance(predictions: Predictions, labels: Tensor) -> Reliance:
    """Which experts the predictions rest on."""
    logits, weights = predictions.expert_logits, predictions.weights
    terms = weights.unsqueeze(2) * (logits - logits.mean(dim=2, keepdim=True))
    sizes = terms.abs().sum(dim=2)
    share = sizes / sizes.sum(dim=1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
    experts = range(logits.shape[1])
    mixture = terms.sum(dim=1)
    return Reliance(
        weight=tuple(weights.mean(dim=0).tolist()),
        share=tuple(share.mean(dim=0).tolist()),
        without=tuple(_accuracy(mixture - terms[:, e], labels) for e in experts),
        alone=tuple(_accuracy(logits[:, e], labels) for e in experts),
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()
