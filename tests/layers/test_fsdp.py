"""Tests of FSDP2 (fully_shard): on whole layers as without it, on parts that the kernels do not call an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.layers.test_distributed import RANKS, make_batch, make_layer, make_pair_stack
from tests.support.layers import LayerCase
from tests.support.pair_layers import pair_layer
from tests.support.ranks import start_ranks
from tests.support.routed_layers import make

Make = Callable[[], nn.Module]
Parts = Callable[[Any], Iterable[nn.Module]]
Call = Callable[[Any, list[Tensor]], Tensor]


def make_reference() -> nn.Module:
    layer = make_layer()
    layer.backend = "reference"
    return layer


def make_fusion() -> nn.Module:
    case = LayerCase(dim=16, layers=2, gate="GShardGate", mlp_experts=3)
    fusion: nn.Module = case.reference(torch.float64).interaction_experts[0].fusion_model
    return fusion.eval()


make_pairs = partial(pair_layer, (16, 16))


def make_routed() -> nn.Module:
    return make("GShardGate").double().eval()


def no_parts(layer: Any) -> list[nn.Module]:
    return []


def forward(layer: Any, x: list[Tensor]) -> Tensor:
    return layer(x)[2]


def projections(layer: Any) -> list[nn.Module]:
    return [*layer.norms, *(part for sides in layer.projections for part in sides.values())]


def interaction_experts(layer: Any) -> list[nn.Module]:
    return list(layer.interaction_experts)


# Layer, parts that are sharded before the whole layer, and a call.
WORKING: dict[str, tuple[Make, Parts, Call]] = {
    "InteractionMoE": (make_layer, no_parts, forward),
    "InteractionMoE.inference": (make_layer, no_parts, lambda layer, x: layer.inference(x)[2]),
    "InteractionMoE, experts, reference": (make_reference, interaction_experts, forward),
    "PairInteractionMoE": (make_pairs, no_parts, lambda layer, x: layer(x).logits),
    "PairInteractionMoE.explain": (
        *(make_pairs, no_parts),
        lambda layer, x: layer.explain(x, target=0).expert_values(),
    ),
    "a module around layers": (make_pair_stack, no_parts, lambda model, x: model(x)),
    "PairInteractionMoE, norms and projections": (
        *(make_pairs, projections),
        lambda layer, x: layer(x).logits,
    ),
    "RoutedMLP": (make_routed, no_parts, lambda mlp, x: mlp(x[0])),
    "RoutedMLP, gate": (make_routed, lambda mlp: [mlp.gate], lambda mlp, x: mlp(x[0])),
    "FusionTransformer, encoder layers": (
        *(make_fusion, lambda model: list(model.network)),
        lambda model, x: model(x),
    ),
}
# Parts of an InteractionMoE; with backend="reference" they can be sharded.
REFUSED: dict[str, Parts] = {
    "experts": interaction_experts,
    "fusion models": lambda x: [expert.fusion_model for expert in x.interaction_experts],
    "encoder layers": lambda x: [y for e in x.interaction_experts for y in e.fusion_model.network],
    "reweighting": lambda x: [x.reweight],
}


def shard(layer: nn.Module, parts: Parts) -> nn.Module:
    for part in parts(layer):
        fully_shard(part)
    fully_shard(layer)
    for method in ("inference", "explain"):
        if hasattr(layer, method):
            register_fsdp_forward_method(layer, method)
    return layer


def full(grad: Any) -> Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def results_of_rank(rank: int, _ranks: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    x = make_batch(rank)[0]
    for name, (new, parts, call) in WORKING.items():
        layer = shard(new(), parts)
        output = call(layer, x)
        if output.requires_grad:
            output.square().mean().backward()
        grads = {n: full(p.grad) for n, p in layer.named_parameters() if p.grad is not None}
        results[name] = output.detach(), grads
    for parts in REFUSED.values():
        with pytest.raises(UnsupportedLayer, match="use backend='reference'"):
            forward(shard(make_layer(), parts), x)
    return results


def test_sharded_layers(tmp_path: Path) -> None:
    """Takes over 10 s, because two processes import torch."""
    ranks = start_ranks(RANKS, str(tmp_path), results_of_rank)
    for name, (new, _, call) in WORKING.items():
        layer = new()
        outputs = [call(layer, make_batch(rank)[0]) for rank in range(RANKS)]
        if outputs[0].requires_grad:
            torch.stack([y.square().mean() for y in outputs]).mean().backward()
        wanted = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        for output, results in zip(outputs, ranks, strict=True):
            found, grads = results[name]
            torch.testing.assert_close(found, output.detach(), rtol=1e-9, atol=1e-12)
            assert grads.keys() == wanted.keys(), name
            for parameter, grad in wanted.items():
                torch.testing.assert_close(grads[parameter], grad, rtol=1e-9, atol=1e-12)
        # Negative control: the ranks have different data.
        assert not torch.allclose(outputs[0], outputs[1])
