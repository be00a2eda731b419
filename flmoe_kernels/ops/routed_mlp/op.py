"""torch.library registration of the routed MLP: backends, schemas, fakes, autograd.

The reference is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flmoe_kernels.core.flops import values_of
from flmoe_kernels.core.registration import Derivative, define

from .call import RoutedCall

_INPUTS = (
    "Tensor x, Tensor weight, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, "
    "Tensor? w_gate, Tensor? b_gate, Tensor offsets, Tensor permutation, int act"
)
_DIFFERENTIABLE = 8


def _kernels(backend: str) -> Any:
    """The backend's module with forward and backward for a RoutedCall."""
    match backend:
        case "cpu":
            from . import cpu

            return cpu
        case "triton":
            from . import triton

            return triton
        case _:
            raise ValueError(f"backend: expected cpu or triton, got {backend!r}")


def _forward(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, save_hidden = args
    return _kernels(backend).forward(RoutedCall(*inputs).checked(), save_hidden)


def _backward(backend: str, grad_out: Tensor, hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, wants = args
    call = RoutedCall(*inputs).checked()
    return _kernels(backend).backward(call, *call.checked_gradients(grad_out, hidden), wants)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, save_hidden = args
    call = RoutedCall(*inputs)
    hidden = call.layers_shape if save_hidden else (0,)
    return call.x.new_empty(call.x.shape), call.x.new_empty(hidden)


def _backward_fake(_grad: Tensor, _hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, wanted = args[0], zip(args[:_DIFFERENTIABLE], args[-1], strict=True)
    return tuple(x.new_empty(t.shape if want else (0,)) for t, want in wanted)


def _saved(*args: Any) -> tuple[tuple, tuple]:
    *tensors, act, _save_hidden, _out, hidden = args
    return (hidden, *tensors), (act,)


def _product_flops(call: RoutedCall) -> int:
    """FLOP of one product of all routed rows with a weight; dropped rows do not count if the offsets are known."""
    bounds = values_of(call.offsets)
    rows = bounds[-1] if bounds else call.rows
    return 2 * rows * call.width * call.hidden


def _backward_flops(_grad: Tensor, _hidden: Tensor, *args: Any) -> int:
    """The gradients of the hidden layer, x and the weights."""
    *inputs, wants = args
    call = RoutedCall(*inputs)
    x, weight, w_in, b_in, w_out, _, w_gate, b_gate = wants
    layers = x or weight or w_in or b_in or w_gate or b_gate
    count = layers + x * _layers(call) + w_in + w_out + w_gate
    return count * _product_flops(call)


def _layers(call: RoutedCall) -> int:
    """The number of products of the tokens: w_in, and w_gate of gated experts."""
    return 1 + call.gated


def _forward_flops(*args: Any) -> int:
    call = RoutedCall(*args[:-1])
    return (_layers(call) + 1) * _product_flops(call)


define(
    "routed_mlp",
    f"({_INPUTS}, bool save_hidden) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    Derivative(_DIFFERENTIABLE, _saved),
    flops=_forward_flops,
)
define(
    "routed_mlp_backward",
    f"(Tensor grad_out, Tensor hidden, {_INPUTS}, bool[] wants) "
    f"-> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)
