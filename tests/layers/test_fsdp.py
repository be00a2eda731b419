"""Tests of FSDP2 (fully_shard): on whole layers as without it, on parts that the kernels do not call an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from flmoe_kernels import PairInteractionMoE
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.layers.test_distributed import RANKS, make_batch, make_layer, make_pair_stack
from tests.support.layers import LayerCase
from tests.support.pair_layers import pair_layer
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


def make_pairs() -> PairInteractionMoE:
    return pair_layer((16, 16))


def forward(layer: Any, x: list[Tensor]) -> Tensor:
    return layer(x)[2]


def infer(layer: Any, x: list[Tensor]) -> Tensor:
    return layer.inference(x)[2]


def pooled(layer: Any, x: list[Tensor]) -> Tensor:
    return layer(x).logits


def explained(layer: Any, x: list[Tensor]) -> Tensor:
    return layer.explain(x, target=0).expert_values()


def inside(model: Any, x: list[Tensor]) -> Tensor:
    return model(x)


def routed(layer: Any, x: list[Tensor]) -> Tensor:
    return layer(x[0])


def fused(layer: Any, x: list[Tensor]) -> Tensor:
    return layer(x)


def no_parts(layer: Any) -> list[nn.Module]:
    return []


def projections(layer: Any) -> list[nn.Module]:
    return [*layer.norms, *(part for sides in layer.projections for part in sides.values())]


def interaction_experts(layer: Any) -> list[nn.Module]:
    return list(layer.interaction_experts)


# Layer, parts that are sharded before the whole layer, and a call.
WORKING: dict[str, tuple[Make, Parts, Call]] = {
    "InteractionMoE": (make_layer, no_parts, forward),
    "InteractionMoE.inference": (make_layer, no_parts, infer),
    "InteractionMoE, experts, reference": (make_reference, interaction_experts, forward),
    "PairInteractionMoE": (make_pairs, no_parts, pooled),
    "PairInteractionMoE.explain": (make_pairs, no_parts, explained),
    "a module around layers": (make_pair_stack, no_parts, inside),
    "PairInteractionMoE, norms and projections": (make_pairs, projections, pooled),
    "RoutedMLP": (lambda: make("GShardGate").double().eval(), no_parts, routed),
    "RoutedMLP, gate": (
        lambda: make("GShardGate").double().eval(),
        lambda mlp: [mlp.gate],
        routed,
    ),
    "FusionTransformer, encoder layers": (make_fusion, lambda x: list(x.network), fused),
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


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        results: dict[str, Any] = {}
        x = make_batch(rank)[0]
        for name, (new, parts, call) in WORKING.items():
            layer = shard(new(), parts)
            output = call(layer, x)
            if output.requires_grad:
                output.square().mean().backward()
            grads = {n: full(p.grad) for n, p in layer.named_parameters() if p.grad is not None}
            results[name] = output.detach(), grads
        for name, parts in REFUSED.items():
            layer = shard(make_layer(), parts)
            with pytest.raises(UnsupportedLayer, match="use backend='reference'"):
                forward(layer, x)
            results[name] = "refused"
        torch.save(results, f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of torch that are still running would abort the process at a normal exit


def test_sharded_layers(tmp_path: Path) -> None:
    """Takes over 10 s, because two processes import torch."""
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(RANKS)]
    assert all(results[name] == "refused" for results in ranks for name in REFUSED)
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
