"""Checkpoint files, reports of `swap`, and model state that it must keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.published.report import SwapReport

Make = Callable[[], nn.Module]


class Encoded(nn.Module):
    """A training model: an encoder per modality, then a layer or fusion model."""

    def __init__(self, layer: nn.Module, modalities: int = 2) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(4, 16) for _ in range(modalities))
        self.moe = layer

    def forward(self, parts: list[Tensor], *rest: Any, **named: Any) -> Any:
        tokens = [encode(x) for encode, x in zip(self.encoders, parts, strict=True)]
        return self.moe(tokens, *rest, **named)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """State of a model that a swap without replacements must not change."""
    parts = list(model.named_modules())
    return {
        "modules": [(name, id(part), type(part), part.training) for name, part in parts],
        "attributes": [
            {
                key: (id(value), len(value) if isinstance(value, list) else 0)
                for key, value in vars(part).items()
                if key != "training"
            }
            for _, part in parts
        ],
        "hooks": [
            {key: dict(value) for key, value in vars(part).items() if "_hooks" in key}
            for _, part in parts
        ],
        "tensors": [
            (name, id(t), t._version, t.grad)
            for name, t in (*model.named_parameters(), *model.named_buffers())
        ],
    }


def left(report: SwapReport) -> str:
    assert report.swapped == report.swapped_mlps == ()
    assert len(report.left) == 1
    assert "\n" not in report.left[0].reason
    return report.left[0].reason


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path
