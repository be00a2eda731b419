"""The routed MLP through Triton: allocations, and the launches that fill them.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch, run
from flmoe_kernels.ops.routed_mlp.call import RoutedCall

from . import launch as launches
from .choice import tiles_of

__all__ = ["backward", "forward"]


def forward(call: RoutedCall, save_hidden: bool) -> tuple[Tensor, Tensor]:
    """out (N, D), and the hidden layer before its activation, layers_shape, by row of the permutation.

    Memory beside them: R F for the activated layer, and for K > 1 R D for rows, in x's type.
    """
    out = call.x.new_empty(call.x.shape)
    hidden = call.x.new_empty(call.layers_shape)
    active = call.x.new_empty((call.rows, call.hidden))
    parts = _parts(call, out)
    products = [
        launches.hidden_launch(tiles_of("hidden", call), call, hidden, active),
        launches.rows_launch(tiles_of("rows", call), call, active, parts),
    ]
    run(products + _sums(parts, out), call.x.device)
    return out, hidden if save_hidden else hidden.new_empty((0,))


def backward(
    call: RoutedCall, grad_out: Tensor, hidden: Tensor, wants: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate; those not requested are empty.

    Memory beside them: 2 R F, gated 3 R F, and, for K > 1, R D in x's type, and splits' partial sums, see
    launch.splits_of.
    """
    empty = call.x.new_empty
    want_x, want_weight, *want_parameters = wants
    want_in, want_out, want_gate = (want_parameters[i : i + 2] for i in (0, 2, 4))
    grad_x = empty(call.x.shape if want_x else (0,))
    grad_weight = empty(call.weight.shape if want_weight else (0,))
    grad_hidden, active = empty(call.layers_shape), empty((call.rows, call.hidden))
    found = []
    if want_x or want_weight or any((*want_in, want_out[0], *want_gate)):
        tiles = tiles_of("hidden_gradient", call)
        dots = empty((call.rows, launches.dot_parts(tiles, call)), dtype=torch.float32)
        rows = (grad_out, hidden, grad_hidden, active, dots)
        found.append(launches.hidden_gradient_launch(tiles, call, *rows))
        if want_weight:
            found.append(launches.choice_gradient_launch(call, dots, grad_out, grad_weight))
    if want_x:
        parts = _parts(call, grad_x)
        tiles = tiles_of("rows", call)
        found.append(launches.token_gradient_launch(tiles, call, grad_hidden, parts))
        found += _sums(parts, grad_x)
    run(found, call.x.device)
    by_row, by_gate = (
        (grad_hidden[0], grad_hidden[-1]) if call.gated else (grad_hidden, grad_hidden)
    )
    tokens = (call.x, True)
    of_in = _weight_gradients(call, (by_row, False), tokens, want_in, None)
    sides = ((grad_out, True), (active, False))
    of_out = _weight_gradients(call, *sides, want_out, call.weight)
    of_gate = _weight_gradients(call, (by_gate, False), tokens, want_gate, None)
    return grad_x, grad_weight, *of_in, *of_out, *of_gate


def _weight_gradients(
    call: RoutedCall,
    left: tuple[Tensor, bool],
    right: tuple[Tensor, bool],
    wants: Sequence[bool],
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(E, P, Q) and (E, P), each empty if not wanted; of left (., P) and right (., Q), by token or else by row."""
    experts, p, q = call.experts, left[0].shape[1], right[0].shape[1]
    grad = call.x.new_empty((experts, p, q) if wants[0] else (0,))
    grad_bias = call.x.new_empty((experts, p) if wants[1] else (0,))
    if not any(wants):
        return grad, grad_bias
    tiles = tiles_of("weight_gradient", call)
    splits = launches.splits_of(tiles, call)
    wanted = (grad if wants[0] else None, grad_bias if wants[1] else None)
    parts, of_bias = launches.gradient_parts(tiles, call, *wanted, splits)
    results = (*wanted, parts, of_bias)
    found = [launches.weight_gradient_launch(tiles, call, left, right, results, splits, weight)]
    if splits > 1 and parts is not None:
        found.append(launches.sum_launch(parts.flatten(0, 1), grad.flatten(0, 1), splits=True))
    if splits > 1 and of_bias is not None:
        found.append(launches.sum_launch(of_bias, grad_bias, splits=True))
    run(found, call.x.device)
    return grad, grad_bias


def _parts(call: RoutedCall, out: Tensor) -> Tensor:
    """(N, K, D) to be added up over K, which is `out` itself where there is one choice."""
    shape = (call.tokens, call.choices, call.width)
    return out.view(shape) if call.choices == 1 else call.x.new_empty(shape)


def _sums(parts: Tensor, out: Tensor) -> list[Launch]:
    return [] if parts.shape[1] == 1 else [launches.sum_launch(parts, out)]
