"""Cases of the layer's losses, reweighting features and expert mixture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.aot.cases import Built, meta, stated
from flmoe_kernels.core.triton.launches import Launch, record
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.interaction_losses import triton as losses
from flmoe_kernels.ops.reweighting import triton as reweighting
from flmoe_kernels.profile.shapes import LayerShape, by_name

KERNELS = ("losses", "mean", "gradient", "features", "features_gradient", "mix", "mix_gradient")

TABLE = {**losses.TABLE, **reweighting.TABLE}


@dataclass(frozen=True)
class LayerUse:
    """A layer and its batch. masked: if False, kernels omit the code for masks."""

    shape: str
    batch: int
    lengths: tuple[int, ...]
    dim: int
    classes: int
    dtype: torch.dtype
    masked: bool = True

    @property
    def variant(self) -> str:
        return "" if self.masked else "no masks"

    def launches(self) -> dict[str, Launch]:
        modalities, total = len(self.lengths), sum(self.lengths)
        experts, views, width = modalities + 2, modalities + 1, modalities * self.dim
        latents = meta((experts, views, self.batch, width), self.dtype)
        exists = meta((self.batch, modalities), torch.bool) if self.masked else None
        tokens = meta((self.batch, total, self.dim), self.dtype)
        mask = meta((self.batch, total), torch.bool) if self.masked else None
        weights = meta((self.batch, experts), self.dtype)
        logits = meta((experts, self.batch, self.classes), self.dtype)
        normalized = (1 << modalities) - 1 if self.masked else 0
        with record() as found:
            losses.losses_backward(losses.losses(latents, exists), latents, exists)
            features, statistics = reweighting.features(tokens, mask, self.lengths, normalized)
            reweighting.features_backward(features, features, statistics, mask, self.lengths)
            _, mixed = reweighting.mix(weights, logits, 1.0)
            reweighting.mix_backward(weights, mixed, weights, logits, (True, True), 1.0)
        return dict(zip(KERNELS, found, strict=True))


def of_layer(name: str, dtype: torch.dtype, masked: bool = True) -> LayerUse:
    s = by_name(name, "cuda")
    assert isinstance(s, LayerShape)
    return LayerUse(name, s.batch, s.padded_tokens, s.dim, s.classes, dtype, masked)


# (use, kernels, quick). Rows of "wide" span several chunks of columns.
USES = (
    (of_layer("mmimdb", torch.bfloat16), KERNELS, True),
    (of_layer("mmimdb", torch.float32), KERNELS, False),
    (of_layer("enrico", torch.bfloat16), KERNELS, False),
    (of_layer("mimic", torch.bfloat16), KERNELS, False),
    (of_layer("decor_mimic", torch.bfloat16), ("features", "features_gradient"), False),
    (of_layer("mmhs150k", torch.bfloat16), ("mix", "mix_gradient"), False),
    (of_layer("tokens_24", torch.bfloat16), ("losses", "gradient"), False),
    (of_layer("mimic", torch.float32, masked=False), KERNELS, False),
    (LayerUse("wide", 16, (40, 30, 20), 1024, 300, torch.float16), KERNELS, False),
)


def built(use: LayerUse, kernel: str, architecture: Architecture) -> Built:
    table = stated((TABLE[kernel].shared,) * 3, architecture)
    return Built(use.launches()[kernel], tiles=kernel, table=table)
