"""Public API of the routed MLP: docstring, validation, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation as check
from flmoe_kernels.ops.routing.api import require_index

from . import op as _op  # noqa: F401  registers flmoe::routed_mlp
from . import reference
from .reference import ACTIVATIONS

__all__ = ["routed_mlp", "validate"]
_OPERATOR = "routed_mlp"


def routed_mlp(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    act: str = "gelu",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of the outputs of each token's experts: dispatch, grouped matrix products, combine.

        out[n] = sum over k of weight[n, k] * (act(x[n] @ w_in[e]^T + b_in[e]) @ w_out[e]^T + b_out[e]),
        e = index[n, k]; -1 adds nothing.

    Gated experts (SwiGLU with act="silu", GeGLU with act="gelu") have a weight w_gate; their hidden layer is
    act(x[n] @ w_gate[e]^T + b_gate[e]) * (x[n] @ w_in[e]^T + b_in[e]).

    No rows are padded, and nothing has size (N, E, capacity). Experts may have no rows, and N may be 0. Results
    are bitwise equal for any number of threads.

    Args:
        x: (N, D) float32, float64, bfloat16 or float16; autocast has no effect.
        index: (N, K) int64 or int32, experts from 0 to E - 1, or -1.
        weight: (N, K), same dtype as x.
        w_in, b_in: (E, F, D) and (E, F) or None, same dtype.
        w_out, b_out: (E, D, F) and (E, D) or None, same dtype.
        act: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        w_gate, b_gate: (E, F, D) and (E, F), same dtype; b_gate only with w_gate. w_in and w_gate may be halves of
            one weight (E, 2 F, D) and are then not copied.
        backend: "reference", "cpu" or "triton"; default by device.

    Returns:
        out (N, D). Differentiable with respect to x, weight and all weights and biases.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in routing.gate.
        ValueError: an index is out of range (on the CPU; a GPU drops its row, since a check would synchronize).

    Cost: 4 D F FLOP per kept row forward and 8 D F backward, gated 6 D F and 12 D F; memory O(N K (D + F)).
    Source: the sparse experts of FL-I2MoE's baselines, after FastMoE (arXiv 2103.13262); gated experts: GLU
    variants (arXiv 2002.05202).
    """
    validate(x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate)
    experts, name = w_in.shape[0], backends.choose(_OPERATOR, x, backend)
    index = require_index(index, experts, reads=name != backends.CPU)
    if index.shape != weight.shape:
        raise ValueError(
            f"index: expected {tuple(weight.shape)} as weight, got {tuple(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"index: expected device {x.device} as x, got {index.device}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if name == backends.REFERENCE:
        return reference.routed_mlp(x, index, weight, w_in, b_in, w_out, b_out, act, w_gate, b_gate)
    # The CPU kernels have both; of the backends on a GPU, only some route.
    routing = name if name == backends.CPU else backends.choose("routing", x, backend)
    _, offsets, permutation = torch.ops.flmoe.routing_dispatch(index, experts, routing)
    code = list(ACTIVATIONS).index(act)
    tensors = (x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate)
    # The hidden layer is stored only for a backward.
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    operator = torch.ops.flmoe.routed_mlp
    return operator(*tensors, offsets, permutation, code, trains, name)[0]


def validate(
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
) -> None:
    check.require_tensor("x", x)
    check.require_floating("x", x)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x: expected (N, D) with D from 1, got {tuple(x.shape)}")
    check.require_tensor("w_in", w_in)
    if w_in.dim() != 3 or w_in.shape[0] < 1 or w_in.shape[1] < 1 or w_in.shape[2] != x.shape[1]:
        raise ValueError(
            f"w_in: expected (E, F, {x.shape[1]}) with E and F from 1, got {tuple(w_in.shape)}"
        )
    experts, hidden, width = w_in.shape
    check.require_tensor("weight", weight)
    choices = weight.shape[1] if weight.dim() == 2 else -1
    shapes: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
        ("weight", weight, (x.shape[0], choices), "(N, K)"),
        ("w_in", w_in, (experts, hidden, width), "(E, F, D)"),
        ("b_in", b_in, (experts, hidden), "(E, F)"),
        ("w_out", w_out, (experts, width, hidden), "(E, D, F)"),
        ("b_out", b_out, (experts, width), "(E, D)"),
        ("w_gate", w_gate, (experts, hidden, width), "(E, F, D)"),
        ("b_gate", b_gate, (experts, hidden), "(E, F)"),
    ]
    if w_gate is None and b_gate is not None:
        raise ValueError("b_gate: expected None without w_gate, got a Tensor")
    for name, tensor, shape, letters in shapes:
        if tensor is None and name in ("b_in", "b_out", "w_gate", "b_gate"):
            continue
        check.require_tensor(name, tensor)
        assert tensor is not None
        check.require_shape(name, tensor, shape, letters)
        check.require_same(name, tensor, "x", x)
