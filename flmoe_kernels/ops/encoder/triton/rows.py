"""The encoder's row-wise operators in Triton: checks, allocation and launches.

No call synchronizes with the GPU, and allocations and launches depend only on shapes, so that CUDA graphs can
capture them. Tensors are made contiguous here.

With a count, one int32 on the GPU, only the first `count` rows of each view are computed: forward functions do not
write the others, and gradients of rows are 0 there, because autograd may add them. Pooling reads only the rows of
segments anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.operands import (
    contiguous,
    expect,
    expect_bounds,
    expect_float32_or_half,
    expect_seed,
)
from flmoe_kernels.core.triton.launches import Launch, run
from flmoe_kernels.core.triton.tables import blocks_of
from flmoe_kernels.ops.encoder.wants import rows_wanted

from .rows_kernels import gelu_gradient_kernel, gelu_kernel, norm_gradient_kernel, norm_kernel
from .rows_launch import (
    GROUP,
    Dropout,
    elementwise,
    norm_sum_launch,
    pool_gradient_launch,
    pool_launch,
    shape_of,
    tiles_of,
)
from .rows_pool_kernels import views_gradient_kernel, views_kernel
from .view_rows import view_rows

# Numbers of an expert's rows and offsets within a tile are 32 bits wide.
_MOST_ROWS, _MOST_WIDTH = 2**30, 2**20
# Chunks of an expert's rows in the gradient of a norm: no more than so many, and none of fewer rows. They are 2048
# programs for four experts, several for each place that an H100 has for one, whose parts are 2% of the traffic.
_MOST_CHUNKS, _CHUNK_ROWS = 512, 32
# With a count the gradient of a norm would take about 160 registers, and three blocks would share an SM, not four.
# With 128 nothing spills on these architectures if widths are whole tiles.
_REGISTERS = {80: 128, 90: 128}


def _expect_rows(name: str, x: Tensor, dimensions: int = 3) -> None:
    """Fail unless x is what all else is compared with: an operator can be called without the public API."""
    if x.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got {tuple(x.shape)}")
    expect_float32_or_half(name, x)
    _expect_size(name, math.prod(x.shape[1:-1]), x.shape[-1])


def _expect_size(name: str, rows: int, width: int) -> None:
    if rows > _MOST_ROWS or width > _MOST_WIDTH:
        raise ValueError(
            f"{name}: expected up to 2^30 rows of an expert and widths of 2^20, got {rows} of {width}"
        )


def _dropout(seed: Tensor | None, p: float, like: Tensor) -> Dropout:
    expect_seed(seed, like.device)
    return Dropout(seed, p)


def norm(
    residual: Tensor | None,
    update: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
    count: Tensor | None = None,
    views: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return total (empty without an update), normed, mean, rstd; see encoder/reference.py."""
    x = residual if update is None else update
    assert x is not None
    _expect_rows("residual" if update is None else "update", x)
    for name, each in (("residual", residual), ("update", update)):
        expect(name, each, x.shape, x.dtype, x.device)
    for name, each in (("gain", gain), ("shift", shift)):
        expect(name, each, (x.shape[0], x.shape[2]), x.dtype, x.device)
    dropout, computed = _dropout(seed, p, x), view_rows(count, views, x.shape[1], x.device)
    total = x.new_empty(x.shape if update is not None else (0,))
    normed = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if x.numel():
        arguments = {
            **{"residual": contiguous(residual), "update": contiguous(update)},
            **{"gain": gain.contiguous(), "shift": shift.contiguous(), "eps": eps},
            **{"total": None if update is None else total, "normed": normed},
            **{"mean": mean, "rstd": rstd, **computed.arguments(x.shape[1])},
        }
        run([elementwise(norm_kernel, "norm", x, arguments, dropout, computed.views)], x.device)
    return total, normed, mean, rstd


def norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    seed: Tensor | None,
    p: float,
    self_residual: bool,
    wants: Sequence[bool],
    count: Tensor | None = None,
    views: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, update, gain and shift, see rows_wanted; those not requested are empty."""
    _expect_rows("total", total)
    for name, each in (("grad_total", grad_total), ("grad_normed", grad_normed)):
        expect(name, each, total.shape, total.dtype, total.device)
    for name, each in (("mean", mean), ("rstd", rstd)):
        expect(name, each, total.shape[:2], torch.float32, total.device)
    expect("gain", gain, (total.shape[0], total.shape[2]), total.dtype, total.device)
    dropout = _dropout(seed, p, total)
    computed = view_rows(count, views, total.shape[1], total.device)
    wanted = (*rows_wanted(seed, self_residual, wants), *wants[2:])
    summed = grad_normed is not None and total.numel() > 0 and any(wants[2:])
    new = gain.new_empty if summed else gain.new_zeros
    grads = [
        *(total.new_empty(total.shape if want else (0,)) for want in wanted[:2]),
        *(new(gain.shape) if want else gain.new_empty(0) for want in wanted[2:]),
    ]
    if total.numel() and (summed or any(wanted[:2])):
        experts, rows, width = total.shape
        high, columns, warps = shape_of(tiles_of("norm_gradient", total.dtype), width)
        sizes, chunk = computed.arguments(rows), _norm_chunk(rows, high)
        chunks = computed.views * blocks_of(sizes["rows"], chunk)
        shape = (experts, chunks, 2, width)
        parts = total.new_empty(shape, dtype=torch.float32) if summed else None
        stored = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        first = Launch(
            norm_gradient_kernel,
            experts * chunks,
            {
                **{"grad_total": contiguous(grad_total), "grad_normed": contiguous(grad_normed)},
                **{"total": total.contiguous(), "mean": mean.contiguous()},
                **{"rstd": rstd.contiguous(), "gain": gain.contiguous()},
                **{"grad_residual": stored[0], "grad_update": stored[1], "parts": parts},
                **{"chunk": chunk, **sizes, **dropout.arguments()},
            },
            {"TWICE": self_residual, "WIDTH": width, "PART": columns // 4, "ROWS": high},
            warps,
            1,
            _REGISTERS if count is not None and columns == width and warps == 4 else {},
        )
        # The second launch reads the parts that the first writes.
        run(
            [first] if parts is None else [first, norm_sum_launch(parts, *stored[2:])], total.device
        )
    return grads[0], grads[1], grads[2], grads[3]


def _norm_chunk(rows: int, high: int) -> int:
    """Rows of an expert that a program of the gradient of a norm sums, in blocks of `high` rows."""
    return blocks_of(max(_CHUNK_ROWS, blocks_of(rows, _MOST_CHUNKS)), high) * high


def gelu(
    x: Tensor, seed: Tensor | None, p: float, count: Tensor | None = None, views: int = 1
) -> Tensor:
    _expect_rows("x", x)
    dropout, out = _dropout(seed, p, x), x.new_empty(x.shape)
    computed = view_rows(count, views, x.shape[1], x.device)
    if x.numel():
        arguments = {"x": x.contiguous(), "out": out, **computed.arguments(x.shape[1])}
        run([elementwise(gelu_kernel, "gelu", x, arguments, dropout, computed.views)], x.device)
    return out


def gelu_backward(
    grad_out: Tensor,
    x: Tensor,
    seed: Tensor | None,
    p: float,
    count: Tensor | None = None,
    views: int = 1,
) -> Tensor:
    """The gradient of x; within expert_mlp, hence not written in the other rows."""
    _expect_rows("x", x)
    expect("grad_out", grad_out, x.shape, x.dtype, x.device)
    dropout, grad_x = _dropout(seed, p, x), x.new_empty(x.shape)
    computed = view_rows(count, views, x.shape[1], x.device)
    if x.numel():
        arguments = {"grad_out": grad_out.contiguous(), "x": x.contiguous(), "grad_x": grad_x}
        arguments |= computed.arguments(x.shape[1])
        launch = (gelu_gradient_kernel, "gelu_gradient", x, arguments, dropout, computed.views)
        run([elementwise(*launch)], x.device)
    return grad_x


def _expect_segments(cu_segments: Tensor, views: int, rows: int, like: Tensor) -> None:
    expect_bounds("cu_segments", cu_segments, like.device)
    if views < 1 or rows % views:
        raise ValueError(f"views: expected a divisor of {rows} rows, got {views}")
    _expect_size("rows", rows, like.shape[-1])


def pool(
    residual: Tensor,
    update: Tensor | None,
    cu_segments: Tensor,
    views: int,
    seed: Tensor | None,
    p: float,
) -> Tensor:
    """Means (E, V, S, D) over segments; segments are clamped to the rows of a view."""
    _expect_rows("residual", residual)
    expect("update", update, residual.shape, residual.dtype, residual.device)
    experts, rows, width = residual.shape
    _expect_segments(cu_segments, views, rows, residual)
    dropout = _dropout(seed, p, residual)
    out = residual.new_empty((experts, views, cu_segments.numel() - 1, width))
    if out.numel():
        residual, cu_segments = residual.contiguous(), cu_segments.contiguous()
        run([pool_launch(residual, contiguous(update), cu_segments, dropout, out)], out.device)
    return out


def pool_backward(
    grad_out: Tensor,
    cu_segments: Tensor,
    views: int,
    rows: int,
    seed: Tensor | None,
    p: float,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients (E, rows, D) of residual and update, see rows_wanted; those not requested are empty.

    They are zero in rows outside all segments.
    """
    _expect_rows("grad_out", grad_out, 4)
    _expect_segments(cu_segments, views, rows, grad_out)
    experts, _, _, width = grad_out.shape
    shape = (experts, views, cu_segments.numel() - 1, width)
    expect("grad_out", grad_out, shape, grad_out.dtype, grad_out.device)
    dropout = _dropout(seed, p, grad_out)
    wants = rows_wanted(seed, False, wants)
    full = (experts, rows, width)
    grad_residual, grad_update = (grad_out.new_empty(full if want else (0,)) for want in wants)
    if not grad_out.numel():
        return grad_residual.zero_(), grad_update.zero_()
    grads = [grad if grad.numel() else None for grad in (grad_residual, grad_update)]
    if any(grad is not None for grad in grads):
        grad_out, cu_segments = grad_out.contiguous(), cu_segments.contiguous()
        launch = pool_gradient_launch(grad_out, cu_segments, dropout, *grads)
        run([launch], grad_out.device)
    return grad_residual, grad_update


def views_of(x: Tensor, modality: Tensor, views: int, count: Tensor | None = None) -> Tensor:
    """Expand the original and the replaced rows (E, 2, n, D) to (E, V, n, D)."""
    _expect_rows("x", x, 4)
    experts, _, rows, width = x.shape
    expect("x", x, (experts, 2, rows, width), x.dtype, x.device)
    expect("modality", modality, (rows,), torch.int32, x.device)
    _expect_size("views", views * rows, width)
    view_rows(count, 1, rows, x.device)
    out = x.new_empty((experts, views, rows, width))
    _views(views_kernel, "views", out, modality, count, x=x.contiguous(), out=out)
    return out


def views_backward(grad_out: Tensor, modality: Tensor, count: Tensor | None = None) -> Tensor:
    _expect_rows("grad_out", grad_out, 4)
    experts, views, rows, width = grad_out.shape
    expect("modality", modality, (rows,), torch.int32, grad_out.device)
    view_rows(count, 1, rows, grad_out.device)
    grad_x = grad_out.new_empty((experts, 2, rows, width))
    if not views:
        return grad_x.zero_()
    rows_of_views = {"grad_out": grad_out.contiguous(), "grad_x": grad_x}
    _views(views_gradient_kernel, "views_gradient", grad_out, modality, count, **rows_of_views)
    return grad_x


def _views(
    kernel: Any, name: str, wide: Tensor, modality: Tensor, count: Tensor | None, **rows: Tensor
) -> None:
    """wide: the rows of all views."""
    experts, views, length, width = wide.shape
    if not wide.numel():
        return
    tiles = tiles_of(name, wide.dtype)
    # Blocks of columns that divide the width need no mask.
    whole = width & -width
    tiles = replace(tiles, columns=whole) if GROUP <= whole < tiles.columns else tiles
    high, columns, warps = shape_of(tiles, width, 16)
    launch = Launch(
        kernel,
        experts * blocks_of(length, high) * blocks_of(width, columns),
        {**rows, "modality": modality.contiguous(), "count": count, "rows": length},
        {"VIEWS": views, "WIDTH": width, "COLUMNS": columns, "ROWS": high},
        warps,
        1,
    )
    run([launch], wide.device)
