"""Choice of tiles for routed_mlp: launch table or autotune."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.launches import Launch, matrix_precision, run
from flmoe_kernels.core.triton.tables import architecture_of
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.routed_mlp.call import RoutedCall

from . import launch as launches
from .table import TABLE, Tiles, candidates, key_of, narrower

Make = Callable[[Tiles], tuning.Trial[Tiles]]


def tiles_of(kernel: str, call: RoutedCall, architecture: Architecture | None = None) -> Tiles:
    """The launch table's tiles for an architecture. None: the tiles for the device of the call's tensors,
    with autotune the fastest tiles."""
    if architecture is None and tuning.enabled():
        return fastest(kernel, call)
    place = architecture_of(call.x.device) if architecture is None else architecture
    return TABLE.tiles(key_of(kernel, call.x.dtype), place, *narrower(kernel, call))


def fastest(kernel: str, call: RoutedCall) -> Tiles:
    """The tiles for all calls in the same buckets of sizes, see tuning.choose."""
    device, dtype = call.x.device, call.x.dtype
    key = tuning.tuning_key(
        f"routed_mlp.{kernel}",
        "float32" if dtype == torch.float32 else "16 bit",
        dtype,
        device,
        rows=tuning.bucket(call.rows),
        choices=call.choices,
        experts=call.experts,
        width=call.width,
        hidden=call.hidden,
        gated=int(call.gated),
        tf32=int(matrix_precision(dtype, device) == "tf32"),
    )
    tried = candidates(kernel, call, architecture_of(device))
    return tuning.choose(key, tried, lambda: _TRIALS[kernel](call), device)


def _trial(
    call: RoutedCall,
    tiles: Tiles,
    trial_launches: list[Launch],
    buffers: list[Tensor],
    results: Callable[[], list[Tensor]] | None = None,
) -> tuning.Trial[Tiles]:
    device = call.x.device
    return tuning.Trial(tiles, device, partial(run, trial_launches, device), buffers, results)


def _layer(call: RoutedCall) -> Tensor:
    """Zeros (R, F), because no kernel writes dropped rows, and inputs of trials must be finite."""
    return call.x.new_zeros((call.rows, call.hidden))


def _before(call: RoutedCall) -> Tensor:
    """Zeros for the hidden layer before its activation, or for its gradient."""
    return call.x.new_zeros(call.layers_shape)


def _layers(call: RoutedCall) -> tuple[Tensor, Tensor]:
    """The hidden layer of the call before and after its activation."""
    hidden, active = _before(call), _layer(call)
    own = TABLE.tiles(key_of("hidden", call.x.dtype), architecture_of(call.x.device))
    run([launches.hidden_launch(own, call, hidden, active)], call.x.device)
    return hidden, active


def _hidden(call: RoutedCall) -> Make:
    hidden, active = _before(call), _layer(call)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = launches.hidden_launch(tiles, call, hidden, active)
        return _trial(call, tiles, [launch], [hidden, active])

    return make


def _rows(call: RoutedCall) -> Make:
    _, active = _layers(call)
    out = call.x.new_empty((call.tokens, call.choices, call.width))

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = launches.rows_launch(tiles, call, active, out)
        return _trial(call, tiles, [launch], [out])

    return make


def _hidden_gradient(call: RoutedCall) -> Make:
    """Trials of the hidden gradient, with x as grad_out."""
    hidden, active = _layers(call)
    grad = _before(call)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        shape = (call.rows, launches.dot_parts(tiles, call))
        dots = call.x.new_empty(shape, dtype=torch.float32)
        launch = launches.hidden_gradient_launch(tiles, call, call.x, hidden, grad, active, dots)
        buffers = [grad, active, dots]
        return _trial(call, tiles, [launch], buffers, lambda: [grad, active, dots.sum(dim=1)])

    return make


def _weight_gradient(call: RoutedCall) -> Make:
    """Trials of the gradient of w_in, with the activated layer as the gradient, including sums of splits."""
    _, active = _layers(call)
    whole = call.x.new_empty(call.w_in.shape)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        splits = launches.splits_of(tiles, call)
        parts, _ = launches.gradient_parts(tiles, call, whole, None, splits)
        sides, results = ((active, False), (call.x, True)), (whole, None, parts, None)
        products = [launches.weight_gradient_launch(tiles, call, *sides, results, splits, None)]
        if splits > 1 and parts is not None:
            total = launches.sum_launch(parts.flatten(0, 1), whole.flatten(0, 1), splits=True)
            products.append(total)
        buffers = [whole] if parts is None else [whole, parts]
        return _trial(call, tiles, products, buffers, lambda: [whole])

    return make


_TRIALS: dict[str, Callable[[RoutedCall], Make]] = {
    "hidden": _hidden,
    "rows": _rows,
    "hidden_gradient": _hidden_gradient,
    "weight_gradient": _weight_gradient,
}
