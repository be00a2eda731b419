"""Small RoutedMLPs with random parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels import RoutedMLP

D, F, E = 16, 24, 5
GATES = ("NaiveGate", "GShardGate", "SwitchGate", "NoisyGate")
every_gate = pytest.mark.parametrize("gate", GATES)


def make(gate: str = "GShardGate", seed: int = 0, **options: Any) -> RoutedMLP:
    """A RoutedMLP with random biases, which otherwise start as zeros."""
    torch.manual_seed(seed)
    options.setdefault("top_k", 1 if gate == "SwitchGate" else 2)
    mlp = RoutedMLP(E, D, F, gate=gate, **options)
    with torch.no_grad():
        for bias in (mlp.experts.htoh4.bias, mlp.experts.h4toh.bias):
            bias.copy_(torch.randn_like(bias))
    return mlp
