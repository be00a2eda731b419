"""Calls of interaction layers, and dense attention rollouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flmoe_kernels import InteractionMoE
from flmoe_kernels.explain.attribution.experts import readout_weights
from flmoe_kernels.explain.games.tokens import valid_tokens
from tests.support.inputs import draw, draw_masks
from tests.support.layers import LayerCase

CASES = (
    LayerCase((7, 5), batch=3, dim=16, heads=4, layers=2, classes=4, masks="partial"),
    LayerCase((6, 1), batch=2, dim=8, heads=2, layers=3, masks="padded_modality"),
    LayerCase((4, 6), batch=3, dim=8, heads=1, layers=2, masks="padded_sample"),
    LayerCase((5, 3, 4), batch=2, dim=8, heads=2, layers=2, masks="mixed"),
    LayerCase((6, 6), batch=2, dim=16, heads=2, layers=2, compat="i2moe"),
    LayerCase((6, 5), batch=2, dim=8, heads=2, layers=2, masks="partial", gate="GShardGate"),
)


def call_of(case: LayerCase, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Tensor], Any]:
    """The fast layer in eval mode, its inputs and masks."""
    layer = InteractionMoE.adopt(case.reference(dtype).eval())
    return layer, case.inputs(dtype), draw_masks(case.masks, case.batch, case.lengths)


def dense_expert(fusion: Any, inputs: list[Tensor], masks: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits of a reference's fusion model and attention maps (B, H, L, L) of its layers, with gradients."""
    attentions = [layer.attn for layer in fusion.network[:-1]]
    for attention in attentions:
        attention.capture_attn = attention.require_attn_grad = True
    return fusion(inputs, masks), [attention.last_attn for attention in attentions]


def dense_rollout(
    case: LayerCase, dtype: torch.dtype, method: str, explains: str, readout: str | int
) -> list[Tensor]:
    """Definition, with the maps of all heads and the whole product in memory: M x (B, E, L_m)."""
    reference = case.reference(dtype).eval()
    inputs, masks = case.inputs(dtype), draw_masks(case.masks, case.batch, case.lengths)
    weights = reference.reweight(inputs, masks)
    runs = [dense_expert(x.fusion_model, inputs, masks) for x in reference.interaction_experts]
    logits = torch.stack([each for each, _ in runs], dim=1)
    target = (logits * weights.unsqueeze(2)).sum(dim=1).argmax(dim=1)
    valid = valid_tokens(inputs, masks)
    start = readout_weights(readout, valid)
    eye = torch.eye(start.shape[1], dtype=dtype) if case.compat == "fl_i2moe" else 0.0
    values = []
    for e, (own, maps) in enumerate(runs):
        factor = weights[:, e].detach() if explains == "mixture" else 1.0
        score = (own.gather(1, target[:, None])[:, 0] * factor).nansum()
        product = torch.eye(start.shape[1], dtype=dtype)
        gradients = torch.autograd.grad(score, maps, retain_graph=True)
        for attention, gradient in zip(maps, gradients, strict=True):
            if method == "attention_rollout":
                matrix = attention.mean(dim=1) + eye
            else:
                matrix = (attention * gradient).relu().mean(dim=1) + eye
            product = matrix / matrix.sum(dim=2, keepdim=True) @ product
        whole = torch.einsum("bi,bij->bj", start.to(dtype), product)
        # Padded tokens have value 0; the dense form gives NaN for a sample with only padding.
        values.append(torch.where(torch.cat(valid, dim=1), whole, 0.0).detach())
    return list(torch.stack(values, dim=1).split(list(case.lengths), dim=2))


def scaled_rows(values: Tensor, valid: Tensor) -> Tensor:
    """Min-max scaling over valid tokens, row by row."""
    found = torch.zeros_like(values)
    for b, ok in enumerate(valid):
        mine = values[b, ok]
        if len(mine) and mine.max() > mine.min():
            found[b, ok] = (mine - mine.min()) / (mine.max() - mine.min())
    return found


class Weighted(torch.nn.Module):
    """Logits that are linear in the tokens, with known attributions x * weight."""

    def __init__(self, lengths: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.weights = [
            draw(length, width, classes, dtype=torch.float64, seed=70 + m)
            for m, length in enumerate(lengths)
        ]

    def forward(self, inputs: Any, masks: Any) -> Tensor:
        parts = []
        for m, (x, weight) in enumerate(zip(inputs, self.weights, strict=True)):
            kept = x if masks is None or masks[m] is None else x * masks[m].unsqueeze(2)
            parts.append(torch.einsum("blf,lfc->bc", kept, weight))
        return torch.stack(parts).sum(dim=0)
