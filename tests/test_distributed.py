"""The layer under DistributedDataParallel: two ranks' averaged gradients are those of the mean loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer, InteractionMoE

RANKS, LENGTHS, WIDTH = 2, (5, 7), 16


def make_layer() -> InteractionMoE:
    torch.manual_seed(0)
    fusion = FusionTransformer(2, WIDTH, 3, num_layers=2, num_heads=2, dropout=0.0)
    # eval: the reweighting MLP has a dropout of its own.
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


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    try:
        layer = make_layer()
        wrapped = nn.parallel.DistributedDataParallel(layer)
        loss_of(wrapped, rank).backward()
        if rank == 0:
            grads = {name: p.grad for name, p in layer.named_parameters()}
            torch.save(grads, f"{folder}/grads.pt")
    finally:
        dist.destroy_process_group()


def test_gradients_are_averaged_over_ranks(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=RANKS)
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    layer = make_layer()
    (sum(loss_of(layer, rank) for rank in range(RANKS)) / RANKS).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    # One rank's own gradient is not the average: the comparison can fail.
    alone = make_layer()
    loss_of(alone, 0).backward()
    name = "interaction_experts.0.fusion_model.network.0.attn.q.weight"
    assert not torch.allclose(found[name], alone.get_parameter(name).grad, rtol=1e-3)
