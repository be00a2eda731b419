"""Pair layers for tests: random parameters, call data, the definition in loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels import PairInteractionMoE
from flmoe_kernels.ops.pair_moe.kinds import COEFFICIENTS
from tests.support.inputs import draw

BACKENDS = ("reference", "cpu")
DIMS = (5, 4, 6)


def pair_layer(
    dims: Sequence[int] = DIMS[:2],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> PairInteractionMoE:
    """A small layer without parameters of 0 or 1, so that every parameter changes the result."""
    options = {"num_classes": 3, "rank": 3, "value_dim": 4, "normalizer": 5.0} | options
    layer = PairInteractionMoE(dims, **options)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(layer.named_parameters()):
            values = draw(*parameter.shape, seed=100 * seed + i)
            offset = 1.0 if "norms" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + 0.7 * values)
    return layer.to(dtype)


def pair_inputs(
    lengths: Sequence[int],
    dims: Sequence[int] = DIMS,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 50,
) -> list[Tensor]:
    return [
        draw(batch, length, dim, dtype=dtype, seed=seed + m)
        for m, (length, dim) in enumerate(zip(lengths, dims, strict=False))
    ]


def by_definition(
    layer: PairInteractionMoE, inputs: Sequence[Tensor], masks: Sequence[Tensor | None] | None
) -> dict[str, Any]:
    """Logits, expert_logits, mass and tokens by the documented formulas, one pair of tokens at a time."""
    state = layer.state_dict()
    experts, rank = len(layer.kinds), layer.rank
    batch = inputs[0].shape[0]
    expert_logits = inputs[0].new_zeros(batch, len(layer.experts), layer.num_classes)
    tokens = [x.clone() for x in inputs]
    mass = []
    for p, (m, n) in enumerate(layer.modality_pairs):
        packed, valid = [], []
        for side, modality in (("a", m), ("b", n)):
            x = inputs[modality]
            anchor = state[f"anchors.{modality}"].expand(batch, 1, -1)
            x = torch.cat([x, anchor], dim=1)
            x = (x - x.mean(-1, keepdim=True)) / (
                x.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
            x = x * state[f"norms.{modality}.weight"] + state[f"norms.{modality}.bias"]
            x = x @ state[f"projections.{p}.{side}.weight"].T
            x = x + state[f"projections.{p}.{side}.bias"]
            packed.append(x.unflatten(2, (experts, -1)))
            mask = None if masks is None else masks[modality]
            ones = torch.ones(inputs[modality].shape[:2], dtype=torch.bool)
            mask = ones if mask is None else mask.bool()
            valid.append(torch.cat([mask, torch.ones(batch, 1, dtype=torch.bool)], dim=1))
        pair_mass = inputs[0].new_zeros(batch, experts, packed[0].shape[1])
        for b in range(batch):
            for i in valid[0][b].nonzero()[:, 0].tolist():
                for j in valid[1][b].nonzero()[:, 0].tolist():
                    left, right = packed[0][b, i], packed[1][b, j]
                    scores = (left[:, :rank] * right[:, :rank]).sum(1)
                    scores = scores / (rank**0.5 * layer.temperature) + state["gate_bias"][p]
                    if layer.top_k is not None:
                        kept = scores.topk(layer.top_k).indices
                        scores = torch.full_like(scores, -torch.inf).index_copy(
                            0, kept, scores[kept]
                        )
                    for e, (share, kind) in enumerate(
                        zip(scores.softmax(0), layer.kinds, strict=True)
                    ):
                        s1, s2, s3 = COEFFICIENTS[kind]
                        a, c = left[e, rank:], right[e, rank:]
                        message = share * (s1 * a + s2 * c + s3 * a * c)
                        place = layer.experts.index(layer.pair_experts[p][e])
                        expert_logits[b, place] += message @ state["head"][place] / layer.normalizer
                        pair_mass[b, e, i] += share
                        if not layer.token_outputs:
                            continue
                        for side, modality, t in (("a", m, i), ("b", n, j)):
                            if t < tokens[modality].shape[1]:
                                weight = state[f"token_maps.{p}.{side}.weight"]
                                tokens[modality][b, t] += weight @ message / layer.normalizer**0.5
        mass.append(pair_mass)
    logits = state["bias"] + expert_logits.sum(1)
    return {"logits": logits, "expert_logits": expert_logits, "mass": mass, "tokens": tokens}


class PairModel(nn.Module):
    """A PairInteractionMoE whose results are tensors, as torch.cuda.make_graphed_callables needs them."""

    def __init__(self, layer: PairInteractionMoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        out = self.layer(inputs, masks, interaction_losses=True)
        return out.logits, out.losses
