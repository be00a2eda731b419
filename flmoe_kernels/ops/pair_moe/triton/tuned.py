"""The fastest configuration of pair_moe's kernels, by time on the inputs of a call; see flmoe_kernels/tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.launches import Launch, matrix_precision, run
from flmoe_kernels.core.triton.tables import architecture_of
from flmoe_kernels.ops.pair_moe.call import REDUCE_EXPERTS, REDUCE_NONE, REDUCE_POOL, PairCall

from .launch import (
    Sides,
    forward_with,
    gate_gradient_with,
    make_sides,
    map_with,
    operand,
    project_launches,
    row_blocks,
)
from .table import Tiles, candidates, class_of, few_programs

# Pairs of all experts that a trial of a map fills: 64 MiB.
_MAP = 2**24


def fastest(kernel: str, call: PairCall, reduce: str = REDUCE_NONE) -> Tiles:
    """The answer for all calls of these sizes, in buckets; see tuning.choose. `reduce` is the forward's."""
    device = call.q.device
    summed = reduce == REDUCE_EXPERTS
    # Sums over rows are cut by the answer for outputs of every token.
    reduce = REDUCE_EXPERTS if summed else REDUCE_NONE
    found = candidates(kernel, call, architecture_of(device), reduce)
    sizes = {"batch": call.batch, "rows": call.rows, "columns": call.columns}
    asked = tuning.question(
        f"pair_moe.{kernel}",
        class_of(call),
        call.q.dtype,
        device,
        **{name: tuning.bucket(size) for name, size in sizes.items()},
        **{"experts": call.experts, "rank": call.rank, "width": call.width},
        some=int(call.top_k < call.experts),
        few=int(few_programs(call)),
        summed=int(summed),
        tf32=int(matrix_precision(call.q.dtype) == "tf32"),
    )
    return tuning.choose(asked, found, lambda: _TRIALS[kernel](call, reduce), device)


def _trial(
    call: PairCall,
    tiles: Tiles,
    launches: list[Launch],
    buffers: list[Tensor],
    results: Callable[[], list[Tensor]] | None = None,
) -> tuning.Trial[Tiles]:
    device = call.q.device
    return tuning.Trial(
        tiles, device, lambda: run(launches, device), buffers, results or (lambda: buffers)
    )


def _accumulate(call: PairCall, reduce: str) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """The forward, with an output for every token, and for every expert where they are not added up."""
    y = call.q.new_empty(call.y_shape(reduce))
    mass = call.q.new_empty(call.q.shape[:3], dtype=call.statistics)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = forward_with(tiles, call, reduce, y, mass)
        return _trial(call, tiles, [launch], [y, mass])

    return make


def _gradient(call: PairCall, _reduce: str) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """The gradients of q, k and gate_bias, with a for the cotangent of y."""
    sides = _sides(call, REDUCE_NONE, call.q.dtype, call.a)
    grad_q, grad_k = call.q.new_empty(call.q.shape), call.k.new_empty(call.k.shape)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        shape = (call.batch, row_blocks("gradient", call, tiles=tiles), call.experts)
        bias = call.q.new_empty(shape, dtype=call.statistics)
        launches = [
            gate_gradient_with(tiles, call, sides, operand(grad_q), bias),
            gate_gradient_with(tiles, call, sides, operand(grad_k), None, swapped=True),
        ]
        found = [grad_q, grad_k]
        return _trial(call, tiles, launches, [*found, bias], lambda: [*found, bias.sum(dim=1)])

    return make


def _map(call: PairCall, _reduce: str) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """Contributions of the first rows, with a token's values for the head."""
    sides = _sides(call, REDUCE_POOL, call.statistics, call.a[:, :, 0])
    rows = min(call.rows, max(1, _MAP // (call.batch * call.experts * call.columns)))
    shape = (call.batch, call.experts, rows, call.columns)
    phi = call.q.new_empty(shape, dtype=call.statistics)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = map_with(tiles, call, sides, phi, 0, rows)
        return _trial(call, tiles, [launch], [phi])

    return make


def _sides(call: PairCall, reduce: str, dtype: torch.dtype, cotangent: Tensor) -> Sides:
    sides = make_sides(call, reduce, dtype)
    run(project_launches(call, reduce, cotangent, None, sides), call.q.device)
    return sides


_TRIALS = {"accumulate": _accumulate, "gradient": _gradient, "map": _map}
