"""torch.library registration of pair_moe: schemas, fakes, autograd. Glue only.

The backend is an argument, so that a gradient is computed by the backend that computed the value.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.native import first_order_only, statistics_dtype

from .call import PairCall

_INPUTS = (
    "Tensor q, Tensor k, Tensor a, Tensor c, Tensor? gate_bias, Tensor? mask_a, Tensor? mask_b, "
    "int[] kinds, int top_k, float scale"
)
torch.library.define(
    "flmoe::pair_moe", f"({_INPUTS}, str reduce, str backend) -> (Tensor y, Tensor mass)"
)
torch.library.define(
    "flmoe::pair_moe_backward",
    f"(Tensor grad_y, Tensor? grad_mass, {_INPUTS}, str reduce, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("flmoe::pair_map", f"({_INPUTS}, Tensor head, str backend) -> Tensor")
torch.library.define(
    "flmoe::top_pairs",
    f"({_INPUTS}, Tensor head, int count, str backend) -> (Tensor, Tensor, Tensor)",
)
_NUM_INPUTS = 10


def _backend(name: str) -> Any:
    """The module of a backend: forward, backward, pair_map and top_pairs on a PairCall."""
    return importlib.import_module(f".{name}", __package__)


def _call(inputs: tuple) -> PairCall:
    q, k, a, c, gate_bias, mask_a, mask_b, kinds, top_k, scale = inputs
    return PairCall(q, k, a, c, gate_bias, mask_a, mask_b, tuple(kinds), top_k, scale)


@torch.library.impl("flmoe::pair_moe", ("cpu", "cuda"))
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, reduce, backend = args
    return _backend(backend).forward(_call(tuple(inputs)), reduce)


@torch.library.impl("flmoe::pair_moe_backward", ("cpu", "cuda"))
def _backward(grad_y: Tensor, grad_mass: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *inputs, reduce, backend = args
    return _backend(backend).backward(_call(tuple(inputs)), reduce, grad_y, grad_mass)


@torch.library.impl("flmoe::pair_map", ("cpu", "cuda"))
def _pair_map(*args: Any) -> Tensor:
    *inputs, head, backend = args
    return _backend(backend).pair_map(_call(tuple(inputs)), head)


@torch.library.impl("flmoe::top_pairs", ("cpu", "cuda"))
def _top_pairs(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, head, count, backend = args
    return _backend(backend).top_pairs(_call(tuple(inputs)), head, count)


@torch.library.register_fake("flmoe::pair_moe")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, reduce, _ = args
    call = _call(tuple(inputs))
    mass = call.q.new_empty(call.q.shape[:3], dtype=call.statistics)
    return call.q.new_empty(call.y_shape(reduce), dtype=call.y_dtype(reduce)), mass


@torch.library.register_fake("flmoe::pair_moe_backward")
def _(_grad_y: Tensor, _grad_mass: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    call = _call(args[:_NUM_INPUTS])
    bias = call.q.new_empty((call.experts,), dtype=call.statistics)
    return (*(x.new_empty(x.shape) for x in (call.q, call.k, call.a, call.c)), bias)


@torch.library.register_fake("flmoe::pair_map")
def _(*args: Any) -> Tensor:
    call = _call(args[:_NUM_INPUTS])
    shape = (call.batch, call.experts, call.rows, call.columns)
    return call.q.new_empty(shape, dtype=call.statistics)


@torch.library.register_fake("flmoe::top_pairs")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, count = _call(args[:_NUM_INPUTS]), args[_NUM_INPUTS + 1]
    shape = (call.batch, call.experts + 1, count)
    place = [call.q.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    return call.q.new_empty(shape, dtype=statistics_dtype(call.q.dtype)), place[0], place[1]


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _autograd(ctx: Any, grad_y: Tensor | None, grad_mass: Tensor | None) -> tuple:
    if grad_y is None and grad_mass is None:
        return (None,) * 12
    saved = ctx.saved_tensors  # once: with activation checkpointing each look computes them again
    call = _call((*saved, *ctx.options[:3]))
    reduce = ctx.options[3]
    if grad_y is None:
        grad_y = call.q.new_zeros(call.y_shape(reduce), dtype=call.y_dtype(reduce))
    op = torch.ops.flmoe.pair_moe_backward
    *grads, grad_bias = op(grad_y, grad_mass, *saved, *ctx.options)
    grad_bias = None if call.gate_bias is None else grad_bias.to(call.gate_bias.dtype)
    return (*grads, grad_bias, *(None,) * 7)


torch.library.register_autograd("flmoe::pair_moe", _autograd, setup_context=_setup)
first_order_only("flmoe::pair_moe_backward")
for _op in ("pair_map", "top_pairs"):
    first_order_only(f"flmoe::{_op}", times="not differentiable")
