"""The routed MLP in the native CPU module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flmoe_kernels.core.dtypes import dtype_code
from flmoe_kernels.core.native import address, empty, native, threads
from flmoe_kernels.core.operands import expect

from .call import RoutedCall


def forward(call: RoutedCall, save_hidden: bool) -> tuple[Tensor, Tensor]:
    """Return out (N, D), and the hidden layer before activation, layers_shape, by position in the permutation."""
    out = empty(call.x.shape, call.x)
    hidden = empty(call.layers_shape if save_hidden else (0,), call.x)
    saved = address(hidden) if save_hidden else 0
    native().routed_forward(*_common(call), address(out), saved)
    return out, hidden


def backward(
    call: RoutedCall, grad_out: Tensor, hidden: Tensor, wants: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate; those not requested are empty."""
    grads = [
        empty((0,) if parameter is None or not want else parameter.shape, call.x)
        for parameter, want in zip(call.differentiable, wants, strict=True)
    ]
    grads[1].zero_()  # the kernel does not write the gradients of dropped rows' weights
    native().routed_backward(
        *_common(call),
        *map(address, (grad_out, hidden)),
        [address(g) if want else 0 for g, want in zip(grads, wants, strict=True)],
    )
    return tuple(grads)


def _common(call: RoutedCall) -> tuple:
    expect("x", call.x, call.x.shape, call.x.dtype)  # in host memory, like all other tensors
    tensors = (*call.differentiable, call.offsets, call.permutation)
    sizes = (call.tokens, call.choices, call.experts, call.width, call.hidden)
    strides = [0 if w is None else w.stride(0) for w in (call.w_in, call.w_gate)]
    return dtype_code(call.x), [*map(address, tensors)], sizes, strides, call.act, threads()
