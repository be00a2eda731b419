"""Tests of the layers on two ranks: averaged gradients under DistributedDataParallel, and FSDP2 (fully_shard).

Whole layers give the same results with and without FSDP. Sharded parts raise an error if no kernel calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from flmoe_kernels import FusionTransformer, InteractionMoE, PairInteractionMoE
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support.layers import LayerCase
from tests.support.pair_layers import pair_layer
from tests.support.ranks import start_ranks
from tests.support.routed_layers import make

RANKS, LENGTHS, WIDTH = 2, (5, 7), 16
Make = Callable[[], nn.Module]
Parts = Callable[[Any], Iterable[nn.Module]]
Call = Callable[[Any, list[Tensor]], Tensor]


def make_layer() -> InteractionMoE:
    torch.manual_seed(0)
    fusion = FusionTransformer(2, WIDTH, 3, num_layers=2, num_heads=2, dropout=0.0)
    # eval mode, because the reweighting MLP has dropout.
    return InteractionMoE(2, fusion, hidden_dim=WIDTH, hidden_dim_rw=8).double().eval()


def make_batch(rank: int) -> tuple[list[Tensor], list[Any], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(100 + rank)
    draw = [
        [torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64) for n in LENGTHS]
        for _ in range(5)
    ]
    mask = torch.ones(2, LENGTHS[0], dtype=torch.bool)
    mask[0, 2 + rank :] = False
    return draw[0], [mask, None], draw[1:]


def loss_of(layer: nn.Module, rank: int) -> Tensor:
    inputs, masks, replacements = make_batch(rank)
    outputs = layer(inputs, masks, replacements=replacements)
    return outputs[2].square().mean() + torch.stack(outputs[3]).sum()


class PairStack(nn.Module):
    """Two layers over token pairs; the first returns sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        dims, sizes = (WIDTH, WIDTH), {"rank": 4, "value_dim": 8, "normalizer": 35.0}
        self.below = PairInteractionMoE(dims, num_classes=None, token_outputs=True, **sizes)
        self.above = PairInteractionMoE(dims, num_classes=3, **sizes)

    def forward(self, inputs: list[Tensor | None]) -> Tensor:
        return self.above(self.below(inputs).tokens).logits


def make_pair_stack() -> PairStack:
    return PairStack().double()


def pair_loss(model: nn.Module, rank: int) -> Tensor:
    """A modality is missing on rank 1; all parameters must still get a gradient."""
    a, b = make_batch(rank)[0]
    return model([a, b if rank == 0 else None]).square().mean()


# A layer and its loss under DistributedDataParallel.
AVERAGED: dict[str, tuple[Make, Callable[[nn.Module, int], Tensor]]] = {
    "InteractionMoE": (make_layer, loss_of),
    "pairs with a missing modality on one rank": (make_pair_stack, pair_loss),
}


def averaged_gradients(name: str, rank: int) -> dict[str, Tensor]:
    make_model, loss = AVERAGED[name]
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    # If a parameter has no gradient, the next forward pass raises an error.
    for _ in range(2):
        wrapped.zero_grad()
        loss(wrapped, rank).backward()
    return {n: p.grad for n, p in model.named_parameters()}


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


def interaction_experts(layer: Any) -> list[nn.Module]:
    return list(layer.interaction_experts)


# Layer, parts that are sharded before the whole layer, and a call.
WORKING: dict[str, tuple[Make, Parts, Call]] = {
    "InteractionMoE": (make_layer, no_parts, forward),
    "InteractionMoE.inference": (make_layer, no_parts, lambda layer, x: layer.inference(x)[2]),
    "InteractionMoE, experts, reference": (make_reference, interaction_experts, forward),
    "PairInteractionMoE": (make_pairs, no_parts, lambda layer, x: layer(x).logits),
    "a module around layers": (make_pair_stack, no_parts, lambda model, x: model(x)),
    "RoutedMLP": (make_routed, no_parts, lambda mlp, x: mlp(x[0])),
    "FusionTransformer, encoder layers": (
        *(make_fusion, lambda model: list(model.network)),
        lambda model, x: model(x),
    ),
}
# Parts of an InteractionMoE; with backend="reference" they can be sharded.
REFUSED: dict[str, Parts] = {
    "experts": interaction_experts,
    "encoder layers": lambda x: [y for e in x.interaction_experts for y in e.fusion_model.network],
    "reweighting": lambda x: [x.reweight],
}


def shard(layer: nn.Module, parts: Parts) -> nn.Module:
    for part in parts(layer):
        fully_shard(part)
    fully_shard(layer)
    if hasattr(layer, "inference"):
        register_fsdp_forward_method(layer, "inference")
    return layer


def full(grad: Any) -> Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def sharded_results(rank: int) -> dict[str, Any]:
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


def results_of_rank(rank: int, _ranks: int) -> dict[str, Any]:
    averaged = {name: averaged_gradients(name, rank) for name in AVERAGED}
    return {"averaged": averaged, "sharded": sharded_results(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of both ranks; starting them takes seconds, because each imports torch."""
    return start_ranks(RANKS, str(tmp_path_factory.mktemp("ranks")), results_of_rank)


@pytest.mark.parametrize("name", AVERAGED)
def test_gradients_are_averaged_over_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    make_model, loss = AVERAGED[name]
    found, model, alone = ranks[0]["averaged"][name], make_model(), make_model()
    (sum(loss(model, rank) for rank in range(RANKS)) / RANKS).backward()
    loss(alone, 0).backward()
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(found[n], parameter.grad, rtol=1e-9, atol=1e-12)
    # Negative control: a single rank's gradient is not the average.
    assert not all(torch.allclose(found[n], p.grad, rtol=1e-3) for n, p in alone.named_parameters())


def test_sharded_layers(ranks: list[dict[str, Any]]) -> None:
    for name, (new, _, call) in WORKING.items():
        layer = new()
        outputs = [call(layer, make_batch(rank)[0]) for rank in range(RANKS)]
        if outputs[0].requires_grad:
            torch.stack([y.square().mean() for y in outputs]).mean().backward()
        wanted = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        for output, results in zip(outputs, ranks, strict=True):
            found, grads = results["sharded"][name]
            torch.testing.assert_close(found, output.detach(), rtol=1e-9, atol=1e-12)
            assert grads.keys() == wanted.keys(), name
            for parameter, grad in wanted.items():
                torch.testing.assert_close(grads[parameter], grad, rtol=1e-9, atol=1e-12)
        # Negative control: the ranks have different data.
        assert not torch.allclose(outputs[0], outputs[1])
