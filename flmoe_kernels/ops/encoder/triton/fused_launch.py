"""Launches of the fused steps of an encoder layer: tiles, and the widths that have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.tables import AMD, Table, architecture_of, blocks_of
from flmoe_kernels.core.triton.target import Architecture

from .rows_launch import GROUP, Dropout
from .view_rows import ViewRows

# Widths of rows that fit on chip; rows wider than WIDE have tiles of their own.
WIDE = 128
_NORM_ELEMENTS = 512  # elements of a warp in a step of the gradient of a norm
_LEAST, _WIDEST = 16, 256


@dataclass(frozen=True)
class Tiles:
    """Rows, columns (or depth) of a step of the loop, slices of the epilogue, warps, stages.

    shared: maximum bytes per block on sm_80, sm_90 and sm_100 at the named shapes, in the compiled cases,
    with Triton 3.7.1; tests/bench/test_aot.py checks them.
    """

    rows: int
    columns: int
    slices: int
    warps: int
    stages: int
    shared: tuple[int, int, int]


# (kernel, width over WIDE) -> tiles. A block is the rows of one program. Nothing spills in the compiled cases with
# Triton 3.7.1; with 3.6.0 "mlp_gradient" spills 8 to 24 bytes on sm_90.
# Wide rows: one block of 128 rows fills an SM and loads the weights from L2 once for 128 rows. On sm_90 its
# float32 sums take 128 registers per thread, and more than 32 hidden columns at a time would spill; on sm_100 the
# sums are in tensor memory, and "mlp" takes 64. On sm_80 each of the eight warps computes all rows of a block for
# at least 8 hidden columns, so with fewer than 64 columns some would be computed twice; blocks have 64 rows,
# because 128 spill. On sm_86 and sm_12x a block has at most 99 KiB of shared memory, on AMD 64; there 128 rows
# spill. Narrow rows: batches are small, so blocks are small to use more SMs. Which tiles are fastest has not been
# measured.
TABLE = Table(
    {
        ("norm_product", False): Tiles(64, 64, 1, 4, 3, (57344, 73728, 67600)),
        ("norm_product", True): Tiles(128, 64, 1, 8, 3, (147456, 180224, 167952)),
        ("mlp", False): Tiles(64, 64, 2, 4, 2, (57352, 90120, 84136)),
        ("mlp", True): Tiles(128, 32, 4, 8, 2, (0, 147464, 0)),
        ("mlp_gradient", False): Tiles(64, 32, 2, 4, 2, (45064, 61448, 57384)),
        ("mlp_gradient", True): Tiles(128, 32, 2, 8, 2, (0, 155656, 147496)),
        ("product_norm_gradient", False): Tiles(64, 64, 2, 4, 3, (49152, 73728, 73744)),
        ("product_norm_gradient", True): Tiles(128, 64, 4, 8, 3, (98304, 147456, 147472)),
    },
    {
        80: {
            ("mlp", True): Tiles(64, 64, 4, 8, 2, (106504, 0, 0)),
            ("mlp_gradient", True): Tiles(64, 64, 4, 8, 2, (122888, 0, 0)),
        },
        86: {
            ("norm_product", True): Tiles(128, 32, 1, 8, 2, (86016, 0, 0)),
            ("mlp", True): Tiles(64, 32, 4, 8, 2, (69640, 0, 0)),
            ("mlp_gradient", True): Tiles(64, 32, 4, 8, 2, (77832, 0, 0)),
        },
        100: {("mlp", True): Tiles(128, 64, 4, 8, 2, (0, 0, 200872))},
        AMD: {
            ("mlp", True): Tiles(64, 32, 4, 4, 2, (0, 0, 0)),
            ("mlp_gradient", True): Tiles(64, 32, 2, 8, 2, (0, 0, 0)),
            ("product_norm_gradient", True): Tiles(128, 64, 4, 8, 2, (0, 0, 0)),
        },
    },
)


def fits(dtype: torch.dtype, width: int, hidden: int) -> bool:
    """Whether the fused kernels compute layers of these widths: rows of 16 bits that fit on chip, in whole tiles.

    float32 products are three of TF32, whose operands are split in registers: a block of whole rows does not fit.
    """
    whole = width & (width - 1) == 0 and hidden % _LEAST == 0 and hidden > 0
    return dtype.itemsize == 2 and _LEAST <= width <= _WIDEST and whole


def tiles_of(kernel: str, width: int, architecture: Architecture | None) -> Tiles:
    return TABLE.tiles((kernel, width > WIDE), architecture)


def blocks(kernel: str, x: Tensor, computed: ViewRows) -> int:
    """Number of blocks of rows of an expert of x (E, views * rows, D)."""
    rows = computed.arguments(x.shape[1])["rows"]
    tiles = tiles_of(kernel, x.shape[2], architecture_of(x.device))
    return computed.views * blocks_of(rows, tiles.rows)


def launch_of(
    kernel: Any,
    name: str,
    x: Tensor,
    arguments: dict[str, Any],
    across: tuple[str, int],
    computed: ViewRows,
    dropouts: Mapping[str, Dropout] | None = None,
    **constants: Any,
) -> Launch:
    """One program per block of rows of x. across: name of the constant for the step of the loop, and length of the
    dimension it loops over. dropouts: by the prefix of the arguments."""
    tiles, (what, length) = tiles_of(name, x.shape[2], architecture_of(x.device)), across
    for prefix, dropout in (dropouts or {}).items():
        arguments |= {prefix + key: value for key, value in dropout.arguments().items()}
    width = x.shape[2]
    constants |= {"WIDTH": width, "ROWS": tiles.rows, what: min(tiles.columns, length & -length)}
    if name != "norm_product":
        constants["SLICES"] = max(1, min(tiles.slices, width // 32))
    if name.endswith("gradient"):
        # Columns of a part of the norm's gradient, and rows of a step.
        part = max(GROUP, width) // 4
        height = _NORM_ELEMENTS * tiles.warps // (4 * part)
        constants |= {"PART": part, "HEIGHT": max(1, min(tiles.rows, height))}
    programs = x.shape[0] * blocks(name, x, computed)
    arguments |= computed.arguments(x.shape[1])
    return Launch(kernel, programs, arguments, constants, tiles.warps, tiles.stages)
