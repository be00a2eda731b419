"""Reference layers with faster parts, as a careful PyTorch user would write them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flmoe_kernels.layers.interaction_moe.fusion import Attention, Masks
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE, Replacements
from flmoe_kernels.ops.interaction_losses.reference import interaction_losses


class SdpaAttention(Attention):
    """The reference's attention, computed by torch's scaled_dot_product_attention.

    On the CPU, torch uses its fused kernel only without dropout.
    """

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        heads, width = self.num_heads, dim // self.num_heads
        q = self.q(x).view(batch, length, heads, width).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, heads, width).permute(2, 0, 3, 1, 4)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        p = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, length, dim)))


def with_sdpa(layer: ReferenceInteractionMoE) -> ReferenceInteractionMoE:
    """A copy of the reference whose attention is torch's scaled_dot_product_attention."""
    result = copy.deepcopy(layer)
    for module in result.modules():
        if type(module) is Attention:
            module.__class__ = SdpaAttention
    return result


class VmapInteractionMoE(ReferenceInteractionMoE):
    """The reference with torch.vmap: stacked parameters, one pass over all experts and views.

    It keeps the reference's attention, because on a CPU vmap runs torch's fused attention expert by expert.
    """

    @classmethod
    def adopt(cls, layer: ReferenceInteractionMoE) -> VmapInteractionMoE:
        """A copy of the reference of this class."""
        result = copy.deepcopy(layer)
        result.__class__ = cls
        assert isinstance(result, cls)
        return result

    def forward(
        self,
        inputs: Sequence[Tensor],
        masks: Masks = None,
        *,
        replacements: Replacements | None = None,
    ) -> tuple:
        """Same as the reference's forward, without gate losses."""
        views = len(inputs) + 1
        rows = [self._views_of(m, x, replacements) for m, x in enumerate(inputs)]
        logits, latents = self._experts(rows, _repeated(masks, views))
        logits, latents = (x.unflatten(1, (views, -1)) for x in (logits, latents))
        weights = self.reweight(inputs, masks)
        mixed = torch.einsum("be,ebc->bc", weights, logits[:, 0])
        experts = [
            list(zip(*expert, strict=True))
            for expert in zip(_by_view(logits), _by_view(latents), strict=True)
        ]
        losses = interaction_losses(_by_view(latents))
        return (experts, weights, mixed, losses, list(latents[:, 0]))

    def inference(
        self, inputs: Sequence[Tensor], masks: Masks = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        count = len(self.interaction_experts)
        logits, _ = self._experts([x.expand(count, *x.shape) for x in inputs], masks)
        weights = self.reweight(inputs, masks)
        return list(logits), weights, torch.einsum("be,ebc->bc", weights, logits)

    def _views_of(self, m: int, x: Tensor, replacements: Replacements | None) -> Tensor:
        """(E, views * B, L, D): modality m in every view; view m + 1 has noise instead."""
        count, views = len(self.interaction_experts), self.num_modalities + 1
        if replacements is None:
            noise = torch.randn((count, *x.shape), dtype=x.dtype, device=x.device)
        else:
            noise = torch.stack([row[m] for row in replacements])
        same = x.expand(count, *x.shape)
        return torch.cat([noise if view == m + 1 else same for view in range(views)], dim=1)

    def _experts(self, rows: list[Tensor], masks: Masks) -> tuple[Tensor, Tensor]:
        """Logits and latents (E, n, *); each expert computes its rows of (E, n, L, D)."""
        models: list[nn.Module] = [expert.fusion_model for expert in self.interaction_experts]
        named = [dict(model.named_parameters()) for model in models]
        stacked = {name: torch.stack([model[name] for model in named]) for name in named[0]}

        def expert(parameters: dict[str, Tensor], own: list[Tensor]) -> Any:
            return torch.func.functional_call(models[0], parameters, (own, masks, True))

        return torch.vmap(expert, randomness="different")(stacked, rows)


def _repeated(masks: Masks, views: int) -> list[Tensor | None] | None:
    if masks is None:
        return None
    return [None if mask is None else mask.repeat(views, 1) for mask in masks]


def _by_view(x: Tensor) -> list[list[Tensor]]:
    return [list(expert) for expert in x]
