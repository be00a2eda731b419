"""Values of trained layers on all coalitions of a sample: python -m bench.explain_error.layers FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer, InteractionMoE, PairInteractionMoE, RoutedMLP
from flmoe_kernels.explain import TokenGame

WIDTH, CLASSES, STEPS = 16, 3, 800
LENGTHS = (7, 6)


def samples(count: int) -> tuple[list[Tensor], Tensor]:
    """Tokens of two modalities; the class depends on single tokens, on pairs across modalities and on a copy."""
    x = [torch.randn(count, length, WIDTH) for length in LENGTHS]
    x[1][:, 0] = x[0][:, 0]
    a, b = (each[:, :, 0] for each in x)
    scores = torch.stack(
        [a[:, 0] + a[:, 1] * b[:, 1] + b[:, 2], a[:, 2] * b[:, 3] + a[:, 3], b[:, 4] * a[:, 5]], 1
    )
    return x, scores.argmax(dim=1)


def interaction_moe() -> nn.Module:
    fusion = FusionTransformer(
        num_modalities=2, hidden_dim=WIDTH, output_dim=CLASSES, num_layers=1, num_heads=2
    )
    return InteractionMoE(2, fusion, hidden_dim=WIDTH)


class Routed(nn.Module):
    """The mean over tokens after a RoutedMLP, as a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = RoutedMLP(num_expert=4, d_model=WIDTH, d_hidden=32)
        self.head = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, CLASSES))

    def forward(self, inputs: list[Tensor], masks: list[Tensor] | None = None) -> Tensor:
        x = torch.cat(inputs, dim=1)
        kept = torch.ones(x.shape[:2]) if masks is None else torch.cat(masks, dim=1).to(x.dtype)
        hidden = x + self.mix(x)
        mean = (hidden * kept.unsqueeze(2)).sum(dim=1) / kept.sum(dim=1, keepdim=True).clamp(min=1)
        logits: Tensor = self.head(mean)
        return logits


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "InteractionMoE 13": interaction_moe,
    "PairInteractionMoE 13": lambda: PairInteractionMoE([WIDTH] * 2, num_classes=CLASSES, rank=8),
    "RoutedMLP 13": Routed,
}


def logits_of(found: Any) -> Tensor:
    """The logits of a layer's output."""
    if isinstance(found, Tensor):
        return found
    logits: Tensor = found.logits if hasattr(found, "logits") else found[2]
    return logits


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, build) in enumerate(LAYERS.items()):
        torch.manual_seed(seed)
        layer = build().train()
        optimizer = torch.optim.Adam(layer.parameters(), 5e-3)
        for _ in range(STEPS):
            x, labels = samples(64)
            loss = nn.functional.cross_entropy(logits_of(layer(x)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        layer.eval()
        x, _ = samples(1)
        # Log-probabilities: the logit of a PairInteractionMoE has only interactions of pairs.
        game = TokenGame(layer, x, output="log_prob", fill="zero")
        codes = np.arange(2**game.players)
        values = game((codes[:, None] >> np.arange(game.players)) & 1 == 1)
        np.save(folder / f"{name}.npy", values)
        print(
            name,
            f"loss {float(loss.detach()):.3g}, v(none) {values[0]:.3g}, v(all) {values[-1]:.3g}",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
