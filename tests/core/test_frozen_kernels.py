"""Triton kernels of backwards with frozen inputs compile for GPUs; tests/interpreter compares their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.ops.encoder.triton import fused, rows
from flmoe_kernels.ops.expert_attention import triton as attention
from flmoe_kernels.ops.pair_moe import triton as pair
from flmoe_kernels.ops.pair_moe.call import PairCall
from flmoe_kernels.ops.reweighting import triton as reweighting
from flmoe_kernels.ops.routed_mlp import triton as routed
from flmoe_kernels.ops.routed_mlp.call import RoutedCall

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def of_attention(wants: list[bool]) -> None:
    x, lse = meta(4, 96, 2, 64), meta(4, 96, 2, dtype=FLOAT32)
    grads = [meta(4, 96, 2, 64) if want else None for want in wants]
    cu, seed = meta(5, dtype=torch.int32), meta(1, dtype=torch.int64)
    attention.backward(grads, x, x, x, x, x, lse, cu, seed, 0.5, 0.125)


def of_pairs(wants: list[bool]) -> None:
    gate, value = meta(2, 3, 48, 32), meta(2, 3, 48, 64)
    bias = meta(3, dtype=FLOAT32)
    call = PairCall(gate, gate, value, value, bias, None, None, (0, 2, 3), 3, 1.0)
    pair.backward(call, "none", value, None, wants)


def of_routed(wants: list[bool]) -> None:
    w_in, w_out = meta(3, 96, 64), meta(3, 64, 96)
    biases, places = (meta(3, 96), meta(3, 64)), meta(128, dtype=torch.int32)
    x, offsets = meta(64, 64), meta(4, dtype=torch.int32)
    parameters = (w_in, biases[0], w_out, biases[1], meta(3, 96, 64), meta(3, 96))
    call = RoutedCall(x, meta(64, 2), *parameters, offsets, places, 0)
    routed.backward(call, x, meta(2, 128, 96), wants)


def of_norm(wants: list[bool]) -> None:
    x, statistics = meta(2, 80, 64), meta(2, 80, dtype=FLOAT32)
    seed = meta(1, dtype=torch.int64)
    rows.norm_backward(x, x, x, statistics, statistics, meta(2, 64), seed, 0.5, False, wants)


def of_norm_mlp(wants: list[bool]) -> None:
    x, statistics, vector = meta(2, 80, 64), meta(2, 80, dtype=FLOAT32), meta(2, 64)
    hidden, w_in, w_out = meta(2, 80, 128), meta(2, 128, 64), meta(2, 64, 128)
    drop, saved = (meta(1, dtype=torch.int64), 0.5), (x, statistics, statistics, hidden)
    fused.norm_mlp_backward(x, x, saved, (vector, vector), w_in, w_out, drop, drop, False, wants)


def of_norm_linear(wants: list[bool]) -> None:
    x, statistics, vector = meta(2, 80, 64), meta(2, 80, dtype=FLOAT32), meta(2, 64)
    drop, saved, weight = (None, 0.0), (x, statistics, statistics), meta(2, 192, 64)
    fused.norm_linear_backward(x, meta(2, 80, 192), saved, (vector, vector), weight, drop, wants)


def of_pool(wants: list[bool]) -> None:
    cu, seed = meta(4, dtype=torch.int32), meta(1, dtype=torch.int64)
    rows.pool_backward(meta(2, 3, 3, 64), cu, 3, 60, seed, 0.5, wants)


def of_mixture(wants: list[bool]) -> None:
    weights, logits = meta(8, 4), meta(4, 8, 10)
    reweighting.mix_backward(weights, meta(8, 10), weights, logits, wants, 1.0)


BACKWARDS: list[tuple[Any, Callable[[list[bool]], None], int]] = [
    (attention, of_attention, 3),
    (pair, of_pairs, 5),
    (routed, of_routed, 8),
    (rows, of_norm, 4),
    (fused, of_norm_mlp, 8),
    (fused, of_norm_linear, 5),
    (rows, of_pool, 2),
    (reweighting, of_mixture, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "backward", "inputs"), BACKWARDS)
def test_backwards_with_one_wanted_gradient_compile(
    module: Any,
    backward: Callable[[list[bool]], None],
    inputs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """About 20 s of compiling in all."""
    launches: list[Launch] = []
    monkeypatch.setattr(module, "run", lambda found, _device: launches.extend(found))
    for wanted in range(inputs):
        launches.clear()
        backward([wanted == each for each in range(inputs)])
        assert launches
        for launch in launches:
            assert launch.compile(90).asm["ptx"]
