"""Launches of the fused steps of an encoder layer: tiles, and the widths that have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.tables import AMD, Table, blocks_of
from flmoe_kernels.core.triton.target import Architecture

from .fused_kernels import (
    mlp_gradient_kernel,
    mlp_kernel,
    norm_product_kernel,
    product_norm_gradient_kernel,
)
from .rows_launch import GROUP, Dropout
from .view_rows import ALL, ViewRows

# Widths of rows that fit on chip; rows wider than WIDE have tiles of their own.
WIDE = 128
# Results of the gradient of a norm: the place of the gradient of the norm's result, and what is stored from it.
_NORM_RESULTS = ("normed", "grad_residual", "grad_update", "parts")
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


def _chunk(length: int, most: int) -> int:
    """The largest power of two up to `most` that divides a length."""
    return min(most, length & -length)


def blocks(kernel: str, x: Tensor, computed: ViewRows, architecture: Architecture | None) -> int:
    """Number of blocks of rows of an expert of x (E, views * rows, D)."""
    rows, tiles = computed.arguments(x.shape[1])["rows"], tiles_of(kernel, x.shape[2], architecture)
    return computed.views * blocks_of(rows, tiles.rows)


def _launch(
    kernel: Any,
    name: str,
    x: Tensor,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    across: tuple[str, int],
    computed: ViewRows,
    architecture: Architecture | None,
) -> Launch:
    """One program per block of rows of x. across: name of the constant for the step of the loop, and length of the
    dimension it loops over."""
    tiles, (what, length) = tiles_of(name, x.shape[2], architecture), across
    return Launch(
        kernel,
        x.shape[0] * blocks(name, x, computed, architecture),
        {**arguments, **computed.arguments(x.shape[1])},
        {"WIDTH": x.shape[2], "ROWS": tiles.rows, what: _chunk(length, tiles.columns), **constants},
        tiles.warps,
        tiles.stages,
    )


def _slices(name: str, x: Tensor, architecture: Architecture | None) -> int:
    slices = tiles_of(name, x.shape[2], architecture).slices
    return max(1, min(slices, x.shape[2] // 32))


def _norm_tiles(name: str, x: Tensor, architecture: Architecture | None) -> dict[str, int]:
    """Constants of the gradient of a norm: columns of a part, a step's rows, slices."""
    tiles, part = tiles_of(name, x.shape[2], architecture), max(GROUP, x.shape[2]) // 4
    height = max(1, min(tiles.rows, _NORM_ELEMENTS * tiles.warps // (4 * part)))
    return {"SLICES": _slices(name, x, architecture), "PART": part, "HEIGHT": height}


def _of_dropout(prefix: str, dropout: Dropout) -> dict[str, Any]:
    return {prefix + name: value for name, value in dropout.arguments().items()}


def norm_product(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    weight: Tensor,
    eps: float,
    results: tuple[Tensor, Tensor, Tensor],
    computed: ViewRows = ALL,
    architecture: Architecture | None = None,
) -> Launch:
    """affine: gain and shift; results: out (E, R, N), mean, rstd."""
    outer = weight.shape[1]
    arguments = {
        **{"x": x, "gain": affine[0], "shift": affine[1], "w": weight, "outer": outer, "eps": eps},
        **dict(zip(("out", "mean", "rstd"), results, strict=True)),
    }
    rest = ({"OUTER": outer}, ("COLUMNS", outer), computed, architecture)
    return _launch(norm_product_kernel, "norm_product", x, arguments, *rest)


def mlp(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    dropouts: tuple[Dropout, Dropout],
    eps: float,
    results: tuple[Tensor, Tensor | None, Tensor, Tensor],
    computed: ViewRows = ALL,
    architecture: Architecture | None = None,
) -> Launch:
    """weights: w_in, b_in, w_out, b_out; dropouts: of the activations and of the result; results: out, hidden
    (None if not kept), mean, rstd."""
    hidden = weights[0].shape[1]
    arguments = {
        **{"x": x, "gain": affine[0], "shift": affine[1], "wide": hidden, "eps": eps},
        **dict(zip(("w_in", "b_in", "w_out", "b_out"), weights, strict=True)),
        **dict(zip(("out", "hidden", "mean", "rstd"), results, strict=True)),
        **_of_dropout("", dropouts[0]),
        **_of_dropout("out_", dropouts[1]),
    }
    constants = {"HIDDEN": hidden, "SLICES": _slices("mlp", x, architecture)}
    rest = (("COLUMNS", hidden), computed, architecture)
    return _launch(mlp_kernel, "mlp", x, arguments, constants, *rest)


def mlp_gradient(
    grads: tuple[Tensor | None, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    dropouts: tuple[Dropout, Dropout],
    twice: bool,
    results: tuple[Tensor | None, ...],
    computed: ViewRows = ALL,
    architecture: Architecture | None = None,
) -> Launch:
    """grads: of the result and of the last product; saved: x, mean, rstd, gain, hidden; weights: w_in, w_out;
    dropouts: of the activations and of the step before; results: activation, grad_hidden, and
    _NORM_RESULTS, each None if not needed."""
    x, hidden = saved[0], weights[0].shape[1]
    names = ("activation", "grad_hidden", *_NORM_RESULTS)
    arguments = {
        **{"grad_total": grads[0], "grad_out": grads[1], "wide": hidden},
        **dict(zip(("x", "mean", "rstd", "gain", "hidden"), saved, strict=True)),
        **{"w_in": weights[0], "w_out": weights[1]},
        **dict(zip(names, results, strict=True)),
        **_of_dropout("hidden_", dropouts[0]),
        **_of_dropout("", dropouts[1]),
    }
    constants = {"HIDDEN": hidden, "TWICE": twice, **_norm_tiles("mlp_gradient", x, architecture)}
    rest = (("COLUMNS", hidden), computed, architecture)
    return _launch(mlp_gradient_kernel, "mlp_gradient", x, arguments, constants, *rest)


def product_norm_gradient(
    grads: tuple[Tensor | None, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    dropout: Dropout,
    results: tuple[Tensor | None, ...],
    computed: ViewRows = ALL,
    architecture: Architecture | None = None,
) -> Launch:
    """grads: of x by the residual, and of the product; saved: x, mean, rstd, gain; results: _NORM_RESULTS, None if
    not needed."""
    x, inner = saved[0], weight.shape[1]
    arguments = {
        **{"grad_total": grads[0], "grad": grads[1], "w": weight, "inner": inner},
        **dict(zip(("x", "mean", "rstd", "gain"), saved, strict=True)),
        **dict(zip(_NORM_RESULTS, results, strict=True)),
        **_of_dropout("", dropout),
    }
    name = "product_norm_gradient"
    constants = {"INNER": inner, **_norm_tiles(name, x, architecture)}
    rest = (("DEPTH", inner), computed, architecture)
    return _launch(product_norm_gradient_kernel, name, x, arguments, constants, *rest)
