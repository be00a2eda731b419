"""expert_mlp in Triton: the launches of expert_linear and of GELU with dropout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flmoe_kernels.core.operands import expect

from .linear import linear, linear_backward
from .rows import gelu, gelu_backward


def mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    seed: Tensor | None,
    p: float,
    count: Tensor | None = None,
    views: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the output and the hidden rows before the GELU; the count is as in linear."""
    hidden = linear(x, w_in, b_in, count, views)
    return linear(gelu(hidden, seed, p, count, views), w_out, b_out, count, views), hidden


def mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    hidden: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    seed: Tensor | None,
    p: float,
    wants: Sequence[bool],
    count: Tensor | None = None,
    views: int = 1,
) -> tuple[Tensor, ...]:
    """Gradients of x, w_in, b_in, w_out and b_out; those not requested are empty.

    The activation is computed again, one launch, instead of being kept from the forward. The count is as in
    linear_backward.
    """
    expect("hidden", hidden, (*x.shape[:2], w_in.shape[1]), x.dtype, x.device)
    want_x, want_in, want_bias_in, want_out, want_bias_out = wants
    through = want_x or want_in or want_bias_in
    activation = gelu(hidden, seed, p, count, views) if want_out else hidden
    wants_out = (through, want_out, want_bias_out)
    grad, *out_grads = linear_backward(
        grad_out, activation, w_out, *wants_out, count, views, zeros=False
    )
    if not through:
        return grad, x.new_empty(0), x.new_empty(0), *out_grads
    grad = gelu_backward(grad, hidden, seed, p, count, views)
    wants_in = (want_x, want_in, want_bias_in)
    return *linear_backward(grad, x, w_in, *wants_in, count, views), *out_grads
