"""The reference layer with fused attention, as a careful PyTorch user would write it."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.layers.interaction_moe.fusion import Attention
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE


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
