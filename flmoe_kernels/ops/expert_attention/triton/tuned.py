"""The fastest configuration of expert_attention's kernels, by time on the inputs of a call; see
flmoe_kernels/tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.launches import Launch, matrix_precision, run
from flmoe_kernels.core.triton.tables import architecture_of

from .launch import attend_with, key_gradient_with, query_gradient_with
from .table import TABLE, AttentionCall, Tiles, candidates, class_of


def fastest(kernel: str, call: AttentionCall) -> Tiles:
    """The answer for all calls of these sizes, in buckets; see tuning.choose."""
    device = call.q.device
    groups, rows, heads, width = call.q.shape
    asked = tuning.question(
        f"expert_attention.{kernel}",
        class_of(call),
        call.q.dtype,
        device,
        heads=tuning.bucket(groups * heads),
        rows=tuning.bucket(rows),
        problems=tuning.bucket(call.problems),
        width=width,
        dropout=int(call.seed is not None),
        tf32=int(matrix_precision(call.q.dtype) == "tf32"),
    )
    found = candidates(kernel, call, architecture_of(device))
    return tuning.choose(asked, found, lambda: _TRIALS[kernel](call), device)


def _trial(
    call: AttentionCall, tiles: Tiles, launch: Launch, results: list[Tensor]
) -> tuning.Trial[Tiles]:
    device = call.q.device
    return tuning.Trial(tiles, device, lambda: run([launch], device), results, lambda: results)


def _like_q(call: AttentionCall) -> Tensor:
    return call.q.new_empty(call.q.shape)


def _statistics(call: AttentionCall) -> Tensor:
    return call.q.new_empty(call.q.shape[:3], dtype=torch.float32)


def _attend(call: AttentionCall) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    out, lse = _like_q(call), _statistics(call)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        return _trial(call, tiles, attend_with(tiles, call, out, lse), [out, lse])

    return make


def _own(kernel: str, call: AttentionCall) -> Tiles:
    """What trials that need another kernel's results run it with."""
    return TABLE.tiles((kernel, class_of(call)), architecture_of(call.q.device))


def _query(call: AttentionCall) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """With v for the cotangent."""
    out, lse, delta, grad = _like_q(call), _statistics(call), _statistics(call), _like_q(call)
    run([attend_with(_own("attend", call), call, out, lse)], call.q.device)

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = query_gradient_with(tiles, call, call.v, out, lse, delta, grad)
        return _trial(call, tiles, launch, [grad, delta])

    return make


def _key(call: AttentionCall) -> Callable[[Tiles], tuning.Trial[Tiles]]:
    """With v for the cotangent."""
    out, lse, delta, grad = _like_q(call), _statistics(call), _statistics(call), _like_q(call)
    own = _own("query_gradient", call)
    needed = [attend_with(_own("attend", call), call, out, lse)]
    run([*needed, query_gradient_with(own, call, call.v, out, lse, delta, grad)], call.q.device)
    grad_v = out

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        launch = key_gradient_with(tiles, call, call.v, lse, delta, grad, grad_v)
        return _trial(call, tiles, launch, [grad, grad_v])

    return make


_TRIALS = {"attend": _attend, "query_gradient": _query, "key_gradient": _key}
