"""Tests of error messages: every invalid argument is reported before any computation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from flmoe_kernels import FusionTransformer, InteractionMoE, expert_attention
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support.inputs import cumulative, draw, make_seed
from tests.support.layers import LayerCase

# (argument, "qkv" for all three; wrong value; error; message)
Mistake = tuple[str, Any, type[Exception], str]
Q = draw(6, 2, 4)
CU = cumulative([2, 4])

ATTENTION: list[Mistake] = [
    ("q", [1.0], TypeError, r"expected a Tensor, got list"),
    ("qkv", Q.long(), TypeError, r"expected a floating-point dtype, got torch\.int64"),
    ("v", Q.double(), TypeError, r"expected dtype torch\.float32 as q, got torch\.float64"),
    ("cu_seqlens", CU.long(), TypeError, r"expected int32, got torch\.int64"),
    ("seed", 3, TypeError, r"expected a Tensor, got int"),
    ("qkv", Q.flatten(1), ValueError, r"expected \(rows, H, d\) or .*got \(6, 8\)"),
    ("qkv", Q[..., :0], ValueError, r"expected at least one head of width 1, got \(6, 2, 0\)"),
    ("k", Q[:5], ValueError, r"expected shape \(6, 2, 4\) as q, got \(5, 2, 4\)"),
    ("k", Q.to("meta"), ValueError, r"expected device cpu as q, got meta"),
    ("cu_seqlens", CU[None], ValueError, r"expected \(P \+ 1,\), got \(1, 3\)"),
    ("cu_seqlens", cumulative([2, 5]), ValueError, r".*0 to 6 rows, got \[0, 2, 7\]"),
    ("cu_seqlens", cumulative([3, 4], -1), ValueError, r".*0 to 6 rows, got \[-1, 2, 6\]"),
    ("cu_seqlens", cumulative([4, -2, 4]), ValueError, r".*non-decreasing.* got \[0, 4, 2, 6\]"),
    ("dropout_p", 1.5, ValueError, r"expected a probability from 0 to 1, got 1\.5"),
    ("dropout_p", float("nan"), ValueError, r"expected a probability from 0 to 1, got nan"),
    (
        "seed",
        torch.zeros(2, dtype=torch.int64),
        ValueError,
        r"expected one int64, got shape \(2,\) of torch\.int64",
    ),
    ("backend", "gpu", ValueError, r"expected one of reference, cpu.*got 'gpu'"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "value", "error", "message"), ATTENTION)
def test_expert_attention(
    name: str, value: Any, error: type[Exception], message: str, backend: str
) -> None:
    arguments = {"q": Q, "k": Q, "v": Q, "cu_seqlens": CU, "dropout_p": 0.5, "seed": make_seed()}
    names = list(name) if name == "qkv" else [name]
    arguments |= {"backend": backend} | dict.fromkeys(names, value)
    with pytest.raises(error, match=f"^{names[0]}: {message}"):
        expert_attention(**arguments)


def test_second_derivatives_are_refused() -> None:
    q = Q.clone().requires_grad_()
    out = expert_attention(q, q, q, CU)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"expert_attention_backward has no derivative"):
        torch.autograd.grad(grad.sum(), q)


LEARNED = LayerCase((4, 4), "i2moe", dim=8, batch=2)


def test_learned_positions_take_no_other_length() -> None:
    layer, (a, b) = InteractionMoE.adopt(LEARNED.reference()), LEARNED.inputs()
    with pytest.raises(ValueError, match=r"inputs\[1\]: expected 4 tokens, .* got 3"):
        layer([a, b[:, :3]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"compat": "moe"}, r"compat: expected 'fl_i2moe' or 'i2moe', got 'moe'"),
        ({"num_modalities": 0}, r"num_modalities: expected at least 1, got 0"),
        ({"hidden_dim": 0}, r"hidden_dim: expected at least 1, got 0"),
        ({"output_dim": 0}, r"output_dim: expected at least 1, got 0"),
        ({"num_layers": 0}, r"num_layers: expected at least 1, got 0"),
        ({"num_heads": 0}, r"num_heads: expected at least 1, got 0"),
        ({"num_heads": 3}, r"hidden_dim: expected a multiple of num_heads=3, got 8"),
        ({"compat": "i2moe"}, r"num_patches: compat='i2moe' expected at least 1, got None"),
    ],
)
def test_fusion_transformer(changed: dict[str, Any], message: str) -> None:
    arguments = {"num_modalities": 2, "hidden_dim": 8, "output_dim": 3, **changed}
    with pytest.raises(ValueError, match=message):
        FusionTransformer(**arguments)


def test_construction() -> None:
    fusion = FusionTransformer(1, 8, 3)
    with pytest.raises(ValueError, match=r"num_modalities: expected at least 2, got 1"):
        InteractionMoE(1, fusion, hidden_dim=8)
    with pytest.raises(UnsupportedLayer, match=r"unknown fusion model, Linear"):
        InteractionMoE(2, nn.Linear(8, 8), hidden_dim=8)
    uneven = dataclasses.replace(LEARNED, dropout=0.5).reference()
    for expert in uneven.interaction_experts:
        expert.fusion_model.network[0].dropout1.p = 0.1
    with pytest.raises(UnsupportedLayer, match=r"proj_drop and dropout1 differ, 0\.5 and 0\.1"):
        InteractionMoE.adopt(uneven)
