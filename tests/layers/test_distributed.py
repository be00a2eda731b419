"""Tests of the layers under DistributedDataParallel: averaged gradients equal those of the mean loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer, InteractionMoE, PairInteractionMoE
from tests.support.ranks import start_ranks

RANKS, LENGTHS, WIDTH = 2, (5, 7), 16


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


def gradients(
    make: Callable[[], nn.Module], loss: Callable[[nn.Module, int], Tensor], rank: int, _ranks: int
) -> dict[str, Tensor]:
    layer = make()
    wrapped = nn.parallel.DistributedDataParallel(layer)
    # If a parameter has no gradient, the next forward pass raises an error.
    for _ in range(2):
        wrapped.zero_grad()
        loss(wrapped, rank).backward()
    return {name: p.grad for name, p in layer.named_parameters()}


def test_gradients_are_averaged_over_ranks(tmp_path: Path) -> None:
    found, _ = start_ranks(RANKS, str(tmp_path), partial(gradients, make_layer, loss_of))
    layer = make_layer()
    (sum(loss_of(layer, rank) for rank in range(RANKS)) / RANKS).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    # Negative control: a single rank's gradient is not the average.
    alone = make_layer()
    loss_of(alone, 0).backward()
    name = "interaction_experts.0.fusion_model.network.0.attn.q.weight"
    assert not torch.allclose(found[name], alone.get_parameter(name).grad, rtol=1e-3)


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


@pytest.mark.slow
def test_pair_layers_with_a_missing_modality_on_one_rank(tmp_path: Path) -> None:
    found, _ = start_ranks(RANKS, str(tmp_path), partial(gradients, make_pair_stack, pair_loss))
    model = make_pair_stack()
    (sum(pair_loss(model, rank) for rank in range(RANKS)) / RANKS).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
        assert bool(parameter.grad.any()), name
