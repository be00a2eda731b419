"""Launch table of the encoder's row-wise kernels, and launches of contiguous tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.dropout import DRAWS, keep_scale, keep_threshold
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.tables import blocks_of

from .rows_kernels import norm_sum_kernel
from .rows_pool_kernels import pool_gradient_kernel, pool_kernel

# Columns covered by one group of dropout counters: tiles with dropout are at least this wide.
GROUP = 128
# Segments of up to this many rows on average take the smallest tiles.
_SHORT = 16


@dataclass(frozen=True)
class Tiles:
    """Elements of a tile, maximum columns (0: whole rows), warps.

    shared: maximum bytes per block on sm_80, sm_90 and sm_100 at the named shapes, in the compiled cases,
    with Triton 3.7.1; tests/bench/test_aot.py checks them.
    """

    elements: int
    columns: int
    warps: int
    shared: tuple[int, int, int]


# (kernel, float32) -> tiles, the same for every architecture; not measured. A thread takes 16 bytes of each of a
# tile's four parts. The gradient of a norm keeps two sums for each element and takes half of that, in vectors of 8
# bytes; views hold two operands at once and have no parts. Pooling adds rows up in the tile, which is no wider
# than one group of columns, so that a segment and view have as many programs as there are groups.
TABLE = {
    ("norm", False): Tiles(4096, 0, 4, (128, 128, 128)),
    ("norm", True): Tiles(2048, 0, 4, (64, 64, 64)),
    ("norm_gradient", False): Tiles(2048, 0, 4, (1024, 1024, 1024)),
    ("norm_gradient", True): Tiles(2048, 0, 4, (1024, 1024, 1024)),
    ("norm_sum", False): Tiles(2048, 32, 4, (512, 512, 512)),
    ("norm_sum", True): Tiles(2048, 32, 4, (512, 512, 512)),
    ("gelu", False): Tiles(4096, 512, 4, (0, 0, 0)),
    ("gelu", True): Tiles(2048, 512, 4, (0, 0, 0)),
    ("gelu_gradient", False): Tiles(4096, 512, 4, (0, 0, 0)),
    ("gelu_gradient", True): Tiles(2048, 512, 4, (0, 0, 0)),
    ("pool", False): Tiles(4096, 128, 4, (512, 512, 512)),
    ("pool", True): Tiles(2048, 128, 4, (512, 512, 512)),
    ("pool, short", False): Tiles(1024, 128, 1, (64, 64, 64)),
    ("pool, short", True): Tiles(512, 128, 1, (128, 128, 128)),
    ("pool_gradient", False): Tiles(4096, 512, 4, (256, 256, 256)),
    ("pool_gradient", True): Tiles(2048, 512, 4, (128, 128, 128)),
    ("views", False): Tiles(2048, 256, 4, (0, 0, 0)),
    ("views", True): Tiles(2048, 256, 4, (0, 0, 0)),
    ("views_gradient", False): Tiles(2048, 256, 4, (0, 0, 0)),
    ("views_gradient", True): Tiles(2048, 256, 4, (0, 0, 0)),
}
# A row wider than a tile is processed alone, with more warps, up to the maximum of a block.
_MOST_WARPS = 16


@dataclass(frozen=True)
class Dropout:
    """Dropout arguments of a kernel; seed None means no dropout."""

    seed: Tensor | None
    p: float

    def arguments(self) -> dict[str, Any]:
        dropping = self.seed is not None and keep_threshold(self.p) < DRAWS
        return {
            "seed": self.seed if dropping else None,
            "threshold": keep_threshold(self.p) if dropping else DRAWS,
            "kept_scale": keep_scale(self.p) if dropping else 1.0,
        }


def tiles_of(kernel: str, dtype: torch.dtype) -> Tiles:
    return TABLE[kernel, dtype == torch.float32]


def shape_of(tiles: Tiles, width: int, least: int = GROUP) -> tuple[int, int, int]:
    """Rows and columns of a tile for rows of this width, and its warps; columns are a power of two."""
    columns = max(least, 1 << (width - 1).bit_length())
    columns = min(columns, tiles.columns or columns)
    more = max(1, columns // tiles.elements)
    return max(1, tiles.elements // columns), columns, min(_MOST_WARPS, tiles.warps * more)


def norm_sum_launch(parts: Tensor, grad_gain: Tensor | None, grad_shift: Tensor | None) -> Launch:
    """Gradients (E, D) of gain and shift, None if not wanted, from parts (E, chunks, 2, D)."""
    experts, chunks, _, width = parts.shape
    tiles = tiles_of("norm_sum", parts.dtype)
    high, columns, warps = shape_of(tiles, width, 1)
    return Launch(
        norm_sum_kernel,
        2 * experts * blocks_of(width, columns),
        {"parts": parts, "grad_gain": grad_gain, "grad_shift": grad_shift, "chunks": chunks},
        {"WIDTH": width, "COLUMNS": columns, "LINES": min(high, 128)},
        warps,
        1,
    )


def elementwise(
    kernel: Any,
    name: str,
    like: Tensor,
    arguments: dict[str, Any],
    dropout: Dropout,
    views: int = 1,
) -> Launch:
    """Launch with one program per block of rows and columns of (E, R, D); a block has rows of one of `views`."""
    experts, rows, width = like.shape
    high, columns, warps = shape_of(tiles_of(name, like.dtype), width)
    return Launch(
        kernel,
        experts * views * blocks_of(rows // views, high) * blocks_of(width, columns),
        arguments | dropout.arguments(),
        {"WIDTH": width, "PART": columns // 4, "ROWS": high},
        warps,
        1,
    )


def pool_class(rows: int, segments: int) -> str:
    """The class in TABLE, by the mean length of segments in a view, because shapes do not show more."""
    return "pool, short" if rows <= _SHORT * segments else "pool"


def pool_launch(
    residual: Tensor, update: Tensor | None, cu_segments: Tensor, dropout: Dropout, out: Tensor
) -> Launch:
    experts, views, segments, width = out.shape
    rows = residual.shape[1] // views
    tiles = tiles_of(pool_class(rows, segments), out.dtype)
    high, columns, warps = shape_of(tiles, width)
    return Launch(
        pool_kernel,
        experts * views * segments * blocks_of(width, columns),
        {
            **{"residual": residual, "update": update, "cu": cu_segments, "out": out},
            **{"rows": rows, "views": views, "segments": segments, **dropout.arguments()},
        },
        {"WIDTH": width, "PART": columns // 4, "ROWS": high},
        warps,
        1,
    )


def pool_gradient_launch(
    grad_out: Tensor,
    cu_segments: Tensor,
    dropout: Dropout,
    grad_residual: Tensor | None,
    grad_update: Tensor | None,
) -> Launch:
    like = grad_update if grad_residual is None else grad_residual
    assert like is not None
    views = grad_out.shape[1]
    arguments: dict[str, Any] = {"grad_out": grad_out, "cu": cu_segments}
    arguments |= {"grad_residual": grad_residual, "grad_update": grad_update}
    arguments |= {"rows": like.shape[1] // views, "views": views}
    arguments |= {"segments": cu_segments.shape[0] - 1}
    return elementwise(pool_gradient_kernel, "pool_gradient", like, arguments, dropout)
