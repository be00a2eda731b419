"""Small results of the explanations, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flmoe_kernels.explain import MaskingDrops, PairValues


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


def masking_drops(repeats: int = 3, samples: int = 4, unit: str = "percent") -> MaskingDrops:
    draw = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.rand(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    return MaskingDrops(
        index="faithfulness",
        unit=unit,
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
