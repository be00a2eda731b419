"""The contestants of the layer benchmarks: same parameters, same inputs, different code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.shapes import LayerShape
from flmoe_kernels import FusionTransformer, InteractionMoE, ReferenceInteractionMoE
from flmoe_kernels.interaction_moe.reference import Attention

FAST, REFERENCE, SDPA, COMPILED = "fast", "reference", "reference+sdpa", "compiled+sdpa"


class SdpaAttention(Attention):
    """The reference's attention with its middle lines replaced by torch's scaled_dot_product_attention.

    On the CPU, torch takes its fused kernel for it only where nothing is dropped.
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


def make_reference(shape: LayerShape) -> ReferenceInteractionMoE:
    torch.manual_seed(0)
    sparse = {"mlp_sparse": True, "num_experts": shape.experts} if shape.experts else {}
    sizes = (shape.modalities, shape.dim, shape.classes, shape.layers, shape.heads)
    fusion = FusionTransformer(*sizes, shape.dropout, **sparse)  # type: ignore[arg-type]
    return ReferenceInteractionMoE(
        shape.modalities,
        fusion,
        fusion_sparse=bool(shape.experts),
        hidden_dim=shape.dim,
        temperature_rw=shape.temperature,
    )


def with_sdpa(layer: ReferenceInteractionMoE, shape: LayerShape) -> ReferenceInteractionMoE:
    """A copy of the reference whose attention is torch's scaled_dot_product_attention."""
    copy = make_reference(shape)
    copy.load_state_dict(layer.state_dict())
    for module in copy.modules():
        if type(module) is Attention:
            module.__class__ = SdpaAttention
    return copy


def contestant(name: str, reference: ReferenceInteractionMoE, shape: LayerShape) -> nn.Module:
    if name == REFERENCE:
        return reference
    if name == FAST:
        return InteractionMoE.adopt(reference)
    layer: nn.Module = with_sdpa(reference, shape)
    if name == COMPILED:
        # One fusion pass is the unit: the whole forward, twelve or twenty passes unrolled into one graph,
        # compiles for over ten minutes.
        for module in layer.modules():
            if isinstance(module, FusionTransformer):
                module.compile()
    return layer


def make_inputs(shape: LayerShape) -> tuple[list[Tensor], list[Tensor | None]]:
    """Token sequences, and a mask for every modality that is padded (as frozen encoders deliver them)."""
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(shape.batch, length, shape.dim, generator=generator) for length in shape.tokens
    ]
    masks: list[Tensor | None] = []
    for length, valid in zip(shape.tokens, shape.valid, strict=True):
        count = length if valid is None else valid
        masks.append((torch.arange(length) < count).expand(shape.batch, length).contiguous())
    return inputs, masks


def training_step(layer: nn.Module, inputs: Any, masks: Any) -> Callable[[], None]:
    """Forward, task, interaction and gate losses, backward into every parameter."""
    layer.train()

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        outputs = layer(inputs, masks)
        loss = F.binary_cross_entropy_with_logits(outputs[2], torch.ones_like(outputs[2]))
        loss = loss + 0.5 * torch.stack(list(outputs[3])).mean()
        if layer.fusion_sparse:
            loss = loss + 0.01 * torch.stack([x for row in outputs[4] for x in row]).mean()
        loss.backward()

    return step


def inference(layer: Any, inputs: Any, masks: Any) -> Callable[[], None]:
    layer.eval()

    def call() -> None:
        with torch.no_grad():
            layer.inference(inputs, masks)

    return call
