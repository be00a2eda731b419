"""Launches of the layer itself: its losses, the features of the reweighting, and the mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.aot import costs
from bench.aot.architectures import Architecture
from bench.aot.cases import NONE, ONE, Built, Case, dtype_name, meta
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.ops.interaction_losses.triton import launch as launches
from flmoe_kernels.profile.shapes import LayerShape, by_name

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
KERNELS = ("losses", "mean", "gradient", "features", "features_gradient", "mix", "mix_gradient")
# (shape, dtype, architectures of the quick set); without products one architecture will do.
USES = (
    ("mmimdb", BFLOAT16, ONE),
    ("enrico", BFLOAT16, NONE),
    ("mimic", BFLOAT16, ONE),
    ("mmimdb", FLOAT32, NONE),
)


def cases() -> Iterator[Case]:
    for shape, dtype, quick in USES:
        for kernel in KERNELS:
            build = partial(built, shape, dtype, kernel)
            yield Case("interaction_moe", kernel, shape, dtype_name(dtype), "", build, quick)


def built(shape: str, dtype: torch.dtype, kernel: str, _device: Architecture) -> Built:
    launch = launches_of(shape, dtype)[kernel]
    # An exponential for each weight of the mixture; the rest is sums.
    exponentials = launch.arguments["weights"].numel() if kernel == "mix" else 0.0
    return Built(launch, costs.work(launch, dtype, 0.0, exponentials), tiles=kernel)


def launches_of(shape: str, dtype: torch.dtype) -> dict[str, Launch]:
    s = by_name(shape, "cuda")
    assert isinstance(s, LayerShape)
    experts, total = s.fusion_models, sum(s.tokens)
    return launches.call_launches(
        meta((experts, s.views, s.batch, s.modalities * s.dim), dtype),
        meta((s.batch, total, s.dim), dtype),
        meta((s.batch, total), torch.bool),
        s.tokens,
        meta((experts, s.batch, s.classes), dtype),
    )
