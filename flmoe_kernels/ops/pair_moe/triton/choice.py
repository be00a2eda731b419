"""Choice of tiles for pair_moe: launch table or autotune."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.launches import matrix_precision, run
from flmoe_kernels.core.triton.tables import architecture_of
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.pair_moe.call import REDUCE_EXPERTS, REDUCE_NONE, REDUCE_POOL, PairCall

from .launch import (
    Sides,
    backward_launches,
    forward_launch,
    make_sides,
    map_launch,
    project_launches,
    row_blocks,
)
from .table import TABLE, Tiles, candidates, class_of, few_programs, key_of, narrower

# Pairs of all experts that a trial of a map fills: 64 MiB.
_MAP = 2**24


def tiles_of(
    kernel: str, call: PairCall, architecture: Architecture | None = None, reduce: str = REDUCE_NONE
) -> Tiles:
    """The launch table's tiles for an architecture. None: the tiles for the device of the call's tensors,
    with autotune the fastest tiles. `reduce` is that of the forward."""
    if architecture is None and tuning.enabled():
        return fastest(kernel, call, reduce)
    place = architecture_of(call.q.device) if architecture is None else architecture
    return TABLE.tiles(key_of(kernel, call), place, *narrower(kernel, call))


def fastest(kernel: str, call: PairCall, reduce: str = REDUCE_NONE) -> Tiles:
    """The tiles for all calls in the same buckets of sizes, see tuning.choose. `reduce` is that of the forward."""
    device = call.q.device
    summed = reduce == REDUCE_EXPERTS
    # "pool" sums over rows; it uses the choice for one output per token.
    reduce = REDUCE_EXPERTS if summed else REDUCE_NONE
    sizes = {"batch": call.batch, "rows": call.rows, "columns": call.columns}
    key = tuning.tuning_key(
        f"pair_moe.{kernel}",
        class_of(call),
        call.q.dtype,
        device,
        **{name: tuning.bucket(size) for name, size in sizes.items()},
        **{"experts": call.experts, "rank": call.rank, "width": call.width},
        some=int(call.top_k < call.experts),
        few=int(few_programs(call)),
        summed=int(summed),
        tf32=int(matrix_precision(call.q.dtype, device) == "tf32"),
    )
    tried = candidates(kernel, call, architecture_of(device))
    return tuning.choose(key, tried, lambda: _TRIALS[kernel](call, reduce), device)


def _accumulate(call: PairCall, reduce: str) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """Trials of the forward, with an output per token, and per expert unless experts are summed."""
    device = call.q.device
    y = call.q.new_empty(call.y_shape(reduce))
    mass = call.q.new_empty(call.q.shape[:3], dtype=call.statistics)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = forward_launch(tiles, call, reduce, y, mass)
        return tuning.Trial(tiles, device, partial(run, [launch], device), [y, mass])

    return make


def _gradient(call: PairCall, _reduce: str) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """Trials of all gradients, with a as the gradient of y."""
    device = call.q.device
    sides = _sides(call, REDUCE_NONE, call.q.dtype, call.a)
    grads = [x.new_empty(x.shape) for x in (call.q, call.k, call.a, call.c)]
    sums = candidates("accumulate", call, architecture_of(device))[0]

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        shape = (call.batch, row_blocks(tiles, call), call.experts)
        bias = call.q.new_empty(shape, dtype=call.statistics)
        launches = backward_launches(sums, tiles, call, REDUCE_NONE, call.a, sides, grads, bias)
        return tuning.Trial(
            tiles,
            device,
            partial(run, launches, device),
            [*grads, bias],
            lambda: [*grads, bias.sum(dim=1)],
        )

    return make


def _map(call: PairCall, _reduce: str) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """Trials of the contributions of the first rows, with a token's values as the head."""
    device = call.q.device
    sides = _sides(call, REDUCE_POOL, call.statistics, call.a[:, :, 0])
    rows = min(call.rows, max(1, _MAP // (call.batch * call.experts * call.columns)))
    shape = (call.batch, call.experts, rows, call.columns)
    phi = call.q.new_empty(shape, dtype=call.statistics)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = map_launch(tiles, call, sides, phi, 0, rows)
        return tuning.Trial(tiles, device, partial(run, [launch], device), [phi])

    return make


def _sides(call: PairCall, reduce: str, dtype: torch.dtype, cotangent: Tensor) -> Sides:
    sides = make_sides(call, reduce, dtype)
    run(project_launches(call, reduce, cotangent, None, sides), call.q.device)
    return sides


_TRIALS = {"accumulate": _accumulate, "gradient": _gradient, "map": _map}
