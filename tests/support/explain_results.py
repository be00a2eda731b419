"""Small results of the explanations, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.explain import Attribution, MaskingDrops, PairValues


def pair_values(**changed: Any) -> PairValues:
    """Two modalities of 3 and 2 tokens; the last pair is within one modality."""
    known: dict[str, Any] = {
        "index": "SII",
        "values": np.array([0.5, -1.0, 0.1, 0.3]),
        "standard_errors": np.array([0.1, 0.1, 0.1, 0.0]),
        "pairs": np.array([[0, 3], [1, 4], [2, 4], [0, 1]]),
        "tokens": np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]),
        "lengths": (3, 2),
        "value": 1.0,
        "baseline": 0.0,
        "method": "sampling",
        "stopped_by": "budget",
        "draws": 4,
        "evaluations": 40,
        "batch_size": 8,
        "candidates": "4 listed pairs",
        "game": {"output": "logit"},
    }
    return PairValues(**known | changed)


def masking_drops(repeats: int = 3, samples: int = 4) -> MaskingDrops:
    draw = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.rand(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    return MaskingDrops(
        index="faithfulness",
        unit="percent",
        budgets=(5, 10, 25),
        metrics=("prob", "logit"),
        identified=rand(2, 2, samples, 3),
        random=rand(2, 2, repeats, samples, 3),
        original=rand(2, samples),
        masked=torch.ones(samples, 3, dtype=torch.int64),
        maskable=torch.full((samples,), 9),
        targets=torch.eye(samples, 5, dtype=torch.float64),
        multi_label=False,
        seed=0,
        evaluations=1,
        batch_size=1,
        settings={"fill": "zero"},
    )


def attribution(*values: Tensor, valid: list[Tensor] | None = None, **changed: Any) -> Attribution:
    """Attributions with these values (B, E, L_m) of the modalities; the mixture is their sum over experts."""
    batch, experts, _ = values[0].shape
    known: dict[str, Any] = {
        "index": "gradient_rollout",
        "explains": "mixture",
        "experts": tuple(f"expert {e}" for e in range(experts)),
        "values": values,
        "mixture": tuple(x.sum(dim=1) for x in values),
        "valid": tuple(valid or (torch.ones_like(x[:, 0]).bool() for x in values)),
        "weights": torch.ones(batch, experts, dtype=torch.float64),
        "targets": torch.ones(batch, 1, dtype=torch.float64),
        "multi_label": False,
        "scores": torch.zeros(batch, experts, dtype=torch.float64),
        "completeness_error": None,
        "budget": 1,
        "settings": {"readout": "tokens"},
    }
    return Attribution(**known | changed)
