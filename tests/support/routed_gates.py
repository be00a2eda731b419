"""Small gates of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flmoe_kernels.layers.routed_mlp.gates import Gate, GShardGate, NaiveGate, NoisyGate, SwitchGate

D, E, N = 6, 5, 60
MAKERS: dict[str, Callable[[], Gate]] = {
    "naive": lambda: NaiveGate(D, E, top_k=3),
    "gshard": lambda: GShardGate(D, E),
    "gshard random": lambda: GShardGate(D, E, random_routing=True),
    "switch": lambda: SwitchGate(D, E),
    "noisy": lambda: NoisyGate(D, E, top_k=2),
    "noisy, all": lambda: NoisyGate(D, E, top_k=E),
}
every_gate = pytest.mark.parametrize("name", list(MAKERS))


def make(name: str, training: bool = True) -> Gate:
    torch.manual_seed(0)
    return MAKERS[name]().train(training)


def call(gate: Gate, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """index, weight and loss of a call, always with the same random numbers."""
    torch.manual_seed(1)
    index, weight = gate(x, mask)
    return index, weight, gate.get_loss()
