"""torch.library registration of expert_attention: schemas, fakes, autograd. Glue only.

`flmoe::expert_attention` takes q, k, v apart; `flmoe::expert_attention_packed` takes them as one
(G, rows, 3, H, d) tensor, as a fused projection writes them, and returns one gradient of that shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpu_runtime import empty, first_order_only, statistics_dtype
from . import cpu

_TAIL = "Tensor cu_seqlens, Tensor? seed, float dropout_p, float scale"
_SAVED = "Tensor out, Tensor lse"
torch.library.define(
    "flmoe::expert_attention", f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor)"
)
torch.library.define(
    "flmoe::expert_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_SAVED}, {_TAIL}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("flmoe::expert_attention_packed", f"(Tensor qkv, {_TAIL}) -> (Tensor, Tensor)")
torch.library.define(
    "flmoe::expert_attention_packed_backward",
    f"(Tensor grad_out, Tensor qkv, {_SAVED}, {_TAIL}) -> Tensor",
)


@torch.library.impl("flmoe::expert_attention", "cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, seed: Tensor | None, p: float, scale: float
) -> tuple[Tensor, Tensor]:
    return cpu.forward(q, k, v, cu, seed, p, scale)


@torch.library.impl("flmoe::expert_attention_backward", "cpu")
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    seed: Tensor | None,
    p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (empty(q.shape, q), empty(q.shape, q), empty(q.shape, q))
    cpu.backward(grad_out, q, k, v, cu, seed, out, lse, p, scale, grads)
    return grads


@torch.library.impl("flmoe::expert_attention_packed", "cpu")
def _packed_forward(
    qkv: Tensor, cu: Tensor, seed: Tensor | None, p: float, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return cpu.forward(q, k, v, cu, seed, p, scale)


@torch.library.impl("flmoe::expert_attention_packed_backward", "cpu")
def _packed_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    seed: Tensor | None,
    p: float,
    scale: float,
) -> Tensor:
    q, k, v = qkv.unbind(2)
    grad = empty(qkv.shape, qkv)
    gq, gk, gv = grad.unbind(2)
    cpu.backward(grad_out, q, k, v, cu, seed, out, lse, p, scale, (gq, gk, gv))
    return grad


def _fake_output(x: Tensor, shape: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(shape), x.new_empty(shape[:3], dtype=statistics_dtype(x.dtype))


@torch.library.register_fake("flmoe::expert_attention")
def _(q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_output(q, q.shape)


@torch.library.register_fake("flmoe::expert_attention_packed")
def _(qkv: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_output(qkv, (*qkv.shape[:2], *qkv.shape[3:]))


@torch.library.register_fake("flmoe::expert_attention_backward")
def _(_grad: Tensor, q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@torch.library.register_fake("flmoe::expert_attention_packed_backward")
def _(_grad: Tensor, qkv: Tensor, *_rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, cu, seed, ctx.dropout_p, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, cu, seed)


def _autograd(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple:
    q, k, v, *saved = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 7
    op = torch.ops.flmoe.expert_attention_backward
    grads = op(grad_out, q, k, v, *saved, ctx.dropout_p, ctx.scale)
    return (*grads, None, None, None, None)


def _packed_autograd(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple:
    qkv, *saved = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 5
    op = torch.ops.flmoe.expert_attention_packed_backward
    return (op(grad_out, qkv, *saved, ctx.dropout_p, ctx.scale), None, None, None, None)


torch.library.register_autograd("flmoe::expert_attention", _autograd, setup_context=_setup)
torch.library.register_autograd(
    "flmoe::expert_attention_packed", _packed_autograd, setup_context=_setup
)
first_order_only("flmoe::expert_attention_backward")
first_order_only("flmoe::expert_attention_packed_backward")
