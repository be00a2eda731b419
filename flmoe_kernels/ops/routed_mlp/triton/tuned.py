"""The fastest configuration of routed_mlp's products, by time on the inputs of a call; see
flmoe_kernels/tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.launches import Launch, matrix_precision, run
from flmoe_kernels.core.triton.tables import architecture_of

from . import launch as launches
from .call import RoutedCall
from .launch import tiles_of
from .table import Tiles, candidates

Make = Callable[[Tiles], tuning.Trial[Tiles]]


def fastest(kernel: str, call: RoutedCall) -> Tiles:
    """The answer for all calls of these sizes, in buckets; see tuning.choose."""
    device, dtype = call.x.device, call.x.dtype
    asked = tuning.question(
        f"routed_mlp.{kernel}",
        "float32" if dtype == torch.float32 else "16 bit",
        dtype,
        device,
        rows=tuning.bucket(call.rows),
        choices=call.choices,
        experts=call.experts,
        width=call.width,
        hidden=call.hidden,
        tf32=int(matrix_precision(dtype) == "tf32"),
    )
    found = candidates(kernel, call, architecture_of(device))
    return tuning.choose(asked, found, lambda: _TRIALS[kernel](call), device)


def _trial(
    call: RoutedCall,
    tiles: Tiles,
    found: list[Launch],
    buffers: list[Tensor],
    results: Callable[[], list[Tensor]] | None = None,
) -> tuning.Trial[Tiles]:
    device = call.x.device
    return tuning.Trial(
        tiles, device, lambda: run(found, device), buffers, results or (lambda: buffers)
    )


def _layer(call: RoutedCall) -> Tensor:
    """(R, F), with zeros for the rows that were dropped, which no kernel writes: a trial's inputs are finite."""
    return call.x.new_zeros((call.rows, call.hidden))


def _own(kernel: str, call: RoutedCall) -> Tiles:
    """What trials that need another kernel's results run it with."""
    return tiles_of(kernel, call.x.dtype, architecture_of(call.x.device))


def _layers(call: RoutedCall) -> tuple[Tensor, Tensor]:
    """The hidden layer of the call before and after its activation."""
    hidden, active = _layer(call), _layer(call)
    launch = launches.hidden_with(_own("hidden", call), call, hidden, active)
    run([launch], call.x.device)
    return hidden, active


def _hidden(call: RoutedCall) -> Make:
    hidden, active = _layer(call), _layer(call)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = launches.hidden_with(tiles, call, hidden, active)
        return _trial(call, tiles, [launch], [hidden, active])

    return make


def _rows(call: RoutedCall) -> Make:
    _, active = _layers(call)
    out = call.x.new_empty((call.tokens, call.choices, call.width))

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = launches.rows_with(tiles, call, active, out)
        return _trial(call, tiles, [launch], [out])

    return make


def _hidden_gradient(call: RoutedCall) -> Make:
    """With x for the cotangent."""
    hidden, active = _layers(call)
    grad = _layer(call)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        shape = (call.rows, launches.dot_parts(call, tiles=tiles))
        dots = call.x.new_empty(shape, dtype=torch.float32)
        launch = launches.hidden_gradient_with(tiles, call, call.x, hidden, grad, active, dots)
        buffers = [grad, active, dots]
        return _trial(call, tiles, [launch], buffers, lambda: [grad, active, dots.sum(dim=1)])

    return make


def _weight_gradient(call: RoutedCall) -> Make:
    """The gradient of w_in with the activated layer for the cotangent, sums of splits included."""
    _, active = _layers(call)
    whole = call.x.new_empty(call.w_in.shape)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        splits = launches.splits_of(call, tiles=tiles)
        shape = (call.experts, call.hidden, splits, call.width)
        one = splits == 1
        parts = whole.unsqueeze(2) if one else call.x.new_empty(shape, dtype=torch.float32)
        sides = ((active, False), (call.x, True))
        found = [launches.weight_gradient_with(tiles, call, *sides, parts, None, None)]
        if not one:
            found.append(launches.sum_launch(parts.flatten(0, 1), whole.flatten(0, 1)))
        return _trial(call, tiles, found, [whole, parts], lambda: [whole])

    return make


_TRIALS: dict[str, Callable[[RoutedCall], Make]] = {
    "hidden": _hidden,
    "rows": _rows,
    "hidden_gradient": _hidden_gradient,
    "weight_gradient": _weight_gradient,
}
