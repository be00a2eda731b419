"""Choice of tiles for expert_attention: launch table or autotune."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.launches import Launch, matrix_precision, run
from flmoe_kernels.core.triton.tables import architecture_of
from flmoe_kernels.core.triton.target import Architecture

from .launch import (
    attend_launch,
    gradient_launch,
    key_gradient_launch,
    query_gradient_launch,
)
from .table import TABLE, AttentionCall, Tiles, candidates, class_of


def tiles_of(kernel: str, call: AttentionCall, architecture: Architecture | None = None) -> Tiles:
    """The launch table's tiles for an architecture. None: the tiles for the device of the call's tensors,
    with autotune the fastest tiles."""
    if architecture is None and tuning.enabled():
        return fastest(kernel, call)
    place = architecture_of(call.q.device) if architecture is None else architecture
    return TABLE.tiles((kernel, class_of(call)), place)


def fastest(kernel: str, call: AttentionCall) -> Tiles:
    """The tiles for all calls in the same buckets of sizes, see tuning.choose."""
    device = call.q.device
    groups, rows, heads, width = call.q.shape
    key = tuning.tuning_key(
        f"expert_attention.{kernel}",
        class_of(call),
        call.q.dtype,
        device,
        heads=tuning.bucket(groups * heads),
        rows=tuning.bucket(rows),
        problems=tuning.bucket(call.problems),
        width=width,
        dropout=int(call.seed is not None),
        tf32=int(matrix_precision(call.q.dtype, device) == "tf32"),
    )
    tried = candidates(kernel, call, architecture_of(device))
    return tuning.choose(key, tried, lambda: _TRIALS[kernel](call), device)


def _trial(
    call: AttentionCall, tiles: Tiles, launch: Launch, results: list[Tensor]
) -> tuning.Trial[Tiles]:
    device = call.q.device
    return tuning.Trial(tiles, device, partial(run, [launch], device), results)


def _like_q(call: AttentionCall) -> Tensor:
    return call.q.new_empty(call.q.shape)


def _statistics(call: AttentionCall) -> Tensor:
    return call.q.new_empty(call.q.shape[:3], dtype=torch.float32)


def _attend(call: AttentionCall) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    out, lse = _like_q(call), _statistics(call)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        return _trial(call, tiles, attend_launch(tiles, call, out, lse), [out, lse])

    return make


def _own(kernel: str, call: AttentionCall) -> Tiles:
    """The table's tiles of a kernel that computes the inputs of another kernel's trial."""
    return TABLE.tiles((kernel, class_of(call)), architecture_of(call.q.device))


def _query(call: AttentionCall) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """Trials of the kernel, with v as grad_out."""
    out, lse, delta, grad = _like_q(call), _statistics(call), _statistics(call), _like_q(call)
    run([attend_launch(_own("attend", call), call, out, lse)], call.q.device)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = query_gradient_launch(tiles, call, call.v, out, lse, delta, grad)
        return _trial(call, tiles, launch, [grad, delta])

    return make


def _key(call: AttentionCall) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """Trials of the kernel, with v as grad_out."""
    out, lse, delta, grad = _like_q(call), _statistics(call), _statistics(call), _like_q(call)
    own = _own("query_gradient", call)
    needed = [attend_launch(_own("attend", call), call, out, lse)]
    run([*needed, query_gradient_launch(own, call, call.v, out, lse, delta, grad)], call.q.device)
    grad_v = out

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = key_gradient_launch(tiles, call, call.v, lse, delta, grad, grad_v)
        return _trial(call, tiles, launch, [grad, grad_v])

    return make


def _gradient(call: AttentionCall) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """Trials of the kernel, with v as grad_out."""
    out, lse, grads = _like_q(call), _statistics(call), [_like_q(call) for _ in range(3)]
    run([attend_launch(_own("attend", call), call, out, lse)], call.q.device)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = gradient_launch(tiles, call, call.v, out, lse, grads)
        return _trial(call, tiles, launch, grads)

    return make


_TRIALS = {
    "attend": _attend,
    "query_gradient": _query,
    "key_gradient": _key,
    "gradient": _gradient,
}
