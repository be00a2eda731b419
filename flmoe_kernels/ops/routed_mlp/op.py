"""torch.library registration of routing and of the routed MLP: schemas, fakes, autograd. Glue only.

The backend is an argument, so that a gradient is computed by the backend that computed the value.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.native import first_order_only, statistics_dtype

_WEIGHTS = "Tensor weight, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"
_ORDER = "Tensor offsets, Tensor permutation, int act, str backend"
torch.library.define(
    "flmoe::routed_gate",
    "(Tensor logits, int top_k, bool over_all, str backend) -> (Tensor weight, Tensor index)",
)
torch.library.define(
    "flmoe::routed_limit",
    "(Tensor index, Tensor? mask, int experts, int? capacity, str backend) -> Tensor",
)
torch.library.define(
    "flmoe::routed_dispatch", "(Tensor index, int experts, str backend) -> (Tensor, Tensor, Tensor)"
)
torch.library.define("flmoe::routed_mlp", f"(Tensor x, {_WEIGHTS}, {_ORDER}) -> (Tensor, Tensor)")
torch.library.define(
    "flmoe::routed_mlp_backward",
    f"(Tensor grad_out, Tensor hidden, Tensor x, {_WEIGHTS}, {_ORDER}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _backend(name: str) -> Any:
    """The module of a backend: gate, limit, dispatch, forward, backward."""
    return importlib.import_module(f".{name}", __package__)


@torch.library.impl("flmoe::routed_gate", ("cpu", "cuda"))
def _gate(*args: Any) -> tuple[Tensor, Tensor]:
    index, weight = _backend(args[-1]).gate(*args[:-1])
    return weight, index


@torch.library.impl("flmoe::routed_limit", ("cpu", "cuda"))
def _limit(*args: Any) -> Tensor:
    return _backend(args[-1]).limit(*args[:-1])


@torch.library.impl("flmoe::routed_dispatch", ("cpu", "cuda"))
def _dispatch(index: Tensor, experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(backend).dispatch(index, experts)


@torch.library.impl("flmoe::routed_mlp", ("cpu", "cuda"))
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _backend(args[-1]).forward(*args[:-1])


@torch.library.impl("flmoe::routed_mlp_backward", ("cpu", "cuda"))
def _backward(*args: Any) -> tuple[Tensor, ...]:
    return _backend(args[-1]).backward(*args[:-1])


@torch.library.register_fake("flmoe::routed_gate")
def _(logits: Tensor, top_k: int, *_rest: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("flmoe::routed_limit")
def _(index: Tensor, *_rest: Any) -> Tensor:
    return index.new_empty(index.shape)


@torch.library.register_fake("flmoe::routed_dispatch")
def _(index: Tensor, experts: int, _backend: str) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (experts, experts + 1, index.numel())
    counts, offsets, permutation = (index.new_empty((n,), dtype=torch.int32) for n in sizes)
    return counts, offsets, permutation


@torch.library.register_fake("flmoe::routed_mlp")
def _(x: Tensor, weight: Tensor, w_in: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((weight.numel(), w_in.shape[1]))


@torch.library.register_fake("flmoe::routed_mlp_backward")
def _(_grad: Tensor, _hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors = args[:6]
    return tuple(tensors[0].new_empty((0,)) if t is None else t.new_empty(t.shape) for t in tensors)


def _setup_gate(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.over_all, _ = inputs
    weight, index = output
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, index, weight)


def _autograd_gate(ctx: Any, grad: Tensor | None, _grad_index: None) -> tuple:
    """The derivative of a softmax: over the chosen experts their weights tell all of it."""
    if grad is None:
        return (None,) * 4
    logits, index, weight = ctx.saved_tensors
    wide = statistics_dtype(logits.dtype)
    grad, weight = grad.to(wide), weight.to(wide)
    inner = (grad * weight).sum(dim=1, keepdim=True)
    chosen = torch.zeros_like(logits, dtype=wide).scatter(1, index, weight * grad)
    if ctx.over_all:
        found = chosen - logits.to(wide).softmax(dim=1) * inner
    else:
        found = chosen.scatter_add(1, index, -weight * inner)
    return found.to(logits.dtype), None, None, None


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.act, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _autograd(ctx: Any, grad_out: Tensor | None, _grad_hidden: None) -> tuple:
    if grad_out is None:
        return (None,) * 10
    hidden, x, weight, w_in, b_in, w_out, b_out, offsets, permutation = ctx.saved_tensors
    tensors = (x, weight, w_in, b_in, w_out, b_out, offsets, permutation)
    op = torch.ops.flmoe.routed_mlp_backward
    grads = op(grad_out, hidden, *tensors, ctx.act, ctx.backend)
    wanted = [None if t is None else grad for t, grad in zip(tensors[:6], grads, strict=True)]
    return (*wanted, *(None,) * 4)


torch.library.register_autograd("flmoe::routed_gate", _autograd_gate, setup_context=_setup_gate)
torch.library.register_autograd("flmoe::routed_mlp", _autograd, setup_context=_setup)
first_order_only("flmoe::routed_mlp_backward")
