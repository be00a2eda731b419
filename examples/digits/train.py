"""Training of the published layer on one task, and its predictions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE

from .data import Batch, Encoded, Pairs, Task
from .settings import Settings

EVALUATION_BATCH = 250
WARM_UP = 0.2
LARGEST_GRADIENT = 1.0


class PairClassifier(nn.Module):
    """A user's model that contains the published interaction layer."""

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
    """Cross entropy plus the weighted sum of the experts' interaction losses."""
    _, _, logits, losses, *_ = outputs
    return F.cross_entropy(logits, labels) + interaction_weight * torch.stack(losses).sum()


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, interaction_weight: float
) -> Tensor:
    """Forward, losses, backward, clipping and update on one batch; returns the loss."""
    inputs, masks, labels = batch
    loss = total_loss(model(inputs, masks), labels, interaction_weight)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    return loss.detach()


def train(task: Task, pairs: Pairs, encoded: Encoded, settings: Settings) -> PairClassifier:
    """Train a new published layer on a task."""
    torch.manual_seed(settings.seed)
    model = PairClassifier(task.num_classes, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=WARM_UP
    )
    for _ in range(settings.steps):
        rows = torch.randint(len(pairs), (settings.batch_size,), generator=generator)
        batch = (*pairs.batch(encoded, rows), pairs.labels[rows])
        training_step(model, optimizer, batch, settings.interaction_weight)
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: PairClassifier, pairs: Pairs, encoded: Encoded) -> Tensor:
    """Logits (S, C) of a model in eval mode for all pairs."""
    logits = []
    for start in range(0, len(pairs), EVALUATION_BATCH):
        batch = pairs.batch(encoded, slice(start, start + EVALUATION_BATCH))
        logits.append(model.inference(*batch)[2])
    return torch.cat(logits)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()
