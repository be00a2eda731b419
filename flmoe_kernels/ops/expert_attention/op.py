"""torch.library registration of expert_attention: schemas, fakes, autograd. Glue only.

`flmoe::expert_attention` takes q, k, v apart; `flmoe::expert_attention_packed` takes them as one
(G, rows, 3, H, d) tensor, as a fused projection writes them, and returns one gradient of that shape. The backend
is an argument, so that a gradient is computed by the backend that computed the value.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.backend import CPU
from flmoe_kernels.core.native import empty, first_order_only, statistics_dtype

_TAIL = "Tensor cu_seqlens, Tensor? seed, float dropout_p, float scale, str backend='cpu'"
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


def _backend(name: str) -> Any:
    """The module of a backend: forward and backward on q, k, v (G, rows, H, d)."""
    return importlib.import_module(f".{name}", __package__)


def _empty(shape: Sequence[int], like: Tensor, backend: str) -> Tensor:
    return empty(shape, like) if backend == CPU else like.new_empty(shape)


# torch leaves out trailing arguments that are their schema's default.
@torch.library.impl("flmoe::expert_attention", ("cpu", "cuda"))
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    seed: Tensor | None,
    p: float,
    scale: float,
    backend: str = CPU,
) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(q, k, v, cu, seed, p, scale)


@torch.library.impl("flmoe::expert_attention_backward", ("cpu", "cuda"))
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
    backend: str = CPU,
) -> tuple[Tensor, Tensor, Tensor]:
    g_q, g_k, g_v = (_empty(q.shape, q, backend) for _ in range(3))
    grads = (g_q, g_k, g_v)
    _backend(backend).backward(grad_out, q, k, v, cu, seed, out, lse, p, scale, grads)
    return grads


@torch.library.impl("flmoe::expert_attention_packed", ("cpu", "cuda"))
def _packed_forward(
    qkv: Tensor, cu: Tensor, seed: Tensor | None, p: float, scale: float, backend: str = CPU
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _backend(backend).forward(q, k, v, cu, seed, p, scale)


@torch.library.impl("flmoe::expert_attention_packed_backward", ("cpu", "cuda"))
def _packed_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    seed: Tensor | None,
    p: float,
    scale: float,
    backend: str = CPU,
) -> Tensor:
    q, k, v = qkv.unbind(2)
    grad = _empty(qkv.shape, qkv, backend)
    gq, gk, gv = grad.unbind(2)
    grads = (gq, gk, gv)
    _backend(backend).backward(grad_out, q, k, v, cu, seed, out, lse, p, scale, grads)
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
    *tensors, cu, seed, p, scale, backend = inputs
    ctx.options = (p, scale, backend)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, cu, seed)


def _autograd(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple:
    q, k, v, *saved = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 8
    op = torch.ops.flmoe.expert_attention_backward
    return (*op(grad_out, q, k, v, *saved, *ctx.options), *(None,) * 5)


def _packed_autograd(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple:
    qkv, *saved = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 6
    op = torch.ops.flmoe.expert_attention_packed_backward
    return (op(grad_out, qkv, *saved, *ctx.options), *(None,) * 5)


torch.library.register_autograd("flmoe::expert_attention", _autograd, setup_context=_setup)
torch.library.register_autograd(
    "flmoe::expert_attention_packed", _packed_autograd, setup_context=_setup
)
first_order_only("flmoe::expert_attention_backward")
first_order_only("flmoe::expert_attention_packed_backward")
