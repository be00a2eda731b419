"""Training of the published layer on one task, and its predictions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE

from .data import Encoded, Pairs, Task
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

    def forward(self, inputs: list[Tensor]) -> tuple:
        return self.layer(inputs)

    def inference(self, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        return self.layer.inference(inputs)


def fit(
    model: nn.Module,
    loss_of: Callable[[list[Tensor], Tensor], Tensor],
    pairs: Pairs,
    encoded: Encoded,
    seed: int,
    *,
    batch_size: int,
    steps: int,
    rate: float,
) -> None:
    """Train a model; loss_of(inputs, labels) returns the loss of a batch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=WARM_UP
    )
    for _ in range(steps):
        rows = torch.randint(len(pairs), (batch_size,), generator=generator)
        loss = loss_of(pairs.batch(encoded, rows), pairs.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
    model.eval()


def train(task: Task, pairs: Pairs, encoded: Encoded, settings: Settings) -> PairClassifier:
    """Train a new published layer on cross entropy plus the weighted sum of the experts' interaction losses."""
    torch.manual_seed(settings.seed)
    model = PairClassifier(task.num_classes, settings)

    def loss_of(inputs: list[Tensor], labels: Tensor) -> Tensor:
        _, _, logits, losses, *_ = model(inputs)
        weight = settings.interaction_weight
        return F.cross_entropy(logits, labels) + weight * torch.stack(losses).sum()

    sizes = {"batch_size": settings.batch_size, "steps": settings.steps}
    fit(model, loss_of, pairs, encoded, settings.seed, rate=settings.learning_rate, **sizes)
    return model


@torch.no_grad()
def predict(model: PairClassifier, pairs: Pairs, encoded: Encoded) -> Tensor:
    """Logits (S, C) of a model in eval mode for all pairs."""
    logits = []
    for start in range(0, len(pairs), EVALUATION_BATCH):
        batch = pairs.batch(encoded, slice(start, start + EVALUATION_BATCH))
        logits.append(model.inference(batch)[2])
    return torch.cat(logits)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()
