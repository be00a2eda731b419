"""How the kernels of the routed MLP are launched: tiles, warps, numbers of programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...triton_runtime import Launch, matrix_precision, multiprocessors
from .call import RoutedCall
from .kernels import (
    choice_gradient_kernel,
    hidden_gradient_kernel,
    hidden_kernel,
    rows_kernel,
    sum_kernel,
    weight_gradient_kernel,
)

# Programs on each multiprocessor: two of products, more where each is small.
_EACH, _EACH_SMALL = 2, 8
# A split of an expert's rows is worth its partial sums from so many rows on; and there are no more than this.
_SPLIT_ROWS, _MOST_SPLITS = 512, 16
# Elements that a program of sum_kernel adds up, and columns of choice_gradient_kernel at a time.
_SUM_TILE, _CHOICE_TILE = 2048, (32, 128)


@dataclass(frozen=True)
class Tiles:
    """Tile of results, the chunk of what is summed over, slices that a tile is finished in, warps, stages.

    shared: bytes per block on sm_80, sm_90 and sm_100 at routed_small and routed_large, the largest over all;
    compiled with Triton 3.7.1, whose numbers the static test holds this table to.
    """

    rows: int
    columns: int
    deep: int
    slices: int
    warps: int
    stages: int
    shared: tuple[int, int, int]


# (kernel, float32) -> tiles, the same for every architecture. 128 x 128 takes 64 FLOP per byte from L2 and what
# sm_90's matrix units read from shared memory at full rate; 64 deep is one line of 128 bytes. Three stages of that
# are 96 KiB: two blocks fit an SM of sm_90 and sm_100, and one what sm_89 and sm_12x have. Eight warps, because
# four would hold 128 sums a thread, beside which the activations spill; four slices for the same reason. The
# weight gradient has five stages: its rows' places are loaded in the first two. float32 multiplies three times,
# with operands split in registers: a quarter of the tile for four warps. Where widths are whole tiles none of them
# spills; odd widths, whose elements are read and stored one by one, spill up to 248 bytes a thread in what the
# static test compiles. Which tiles are fastest has not been measured.
TABLE = {
    ("hidden", False): Tiles(128, 128, 64, 4, 8, 3, (65536, 98304, 98320)),
    ("rows", False): Tiles(128, 128, 64, 4, 8, 3, (65536, 98304, 98320)),
    ("hidden_gradient", False): Tiles(128, 128, 64, 4, 8, 3, (65536, 98304, 98320)),
    ("weight_gradient", False): Tiles(128, 128, 64, 1, 8, 5, (49664, 98816, 98832)),
    ("hidden", True): Tiles(64, 64, 32, 2, 4, 3, (32768, 49152, 49160)),
    ("rows", True): Tiles(64, 64, 32, 2, 4, 3, (32768, 49152, 49160)),
    ("hidden_gradient", True): Tiles(64, 64, 32, 2, 4, 3, (32768, 49152, 49160)),
    ("weight_gradient", True): Tiles(64, 64, 32, 1, 4, 5, (33024, 49408, 49416)),
}
# With eight warps two programs share an SM at 128 registers a thread. sm_90 reads operands from shared memory and
# fits without spilling; sm_80 holds them in registers and would spill, so there one program has the SM to itself;
# sm_100 keeps sums in memory of their own and needs no limit, but for the hidden gradient, which is alone. Widths
# that are no whole tiles take masks and more addresses, which would spill: there too one program has the SM.
_REGISTERS = {90: 128}


def tiles_of(kernel: str, dtype: torch.dtype) -> Tiles:
    return TABLE[kernel, dtype == torch.float32]


def _chunk(width: int, most: int) -> int:
    """The chunk that a width is read or written in; a matrix product takes no less than 16."""
    return min(most, max(16, 1 << (width - 1).bit_length()))


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _registers(tiles: Tiles, whole: bool) -> dict[int, int]:
    return _REGISTERS if tiles.warps == 8 and whole else {}


def _persistent(call: RoutedCall, tile_rows: int, across: int, each: int = _EACH) -> int:
    """The number of programs that walk tiles: no more than there can be tiles, whatever the loads."""
    most = (call.rows // tile_rows + call.experts + 1) * across
    return min(each * multiprocessors(call.x.device), most)


def _products(
    kernel: Any, name: str, call: RoutedCall, arguments: dict[str, Any], constants: dict[str, Any]
) -> Launch:
    """A persistent product of rows with weights: INNER summed over, OUTER columns of the result."""
    tiles = tiles_of(name, call.x.dtype)
    inner, outer = constants.pop("sizes")
    columns, deep = _chunk(outer, tiles.columns), _chunk(inner, tiles.deep)
    own = {"offsets": call.offsets, "permutation": call.permutation, "rows": call.rows}
    return Launch(
        kernel,
        _persistent(call, tiles.rows, _blocks(outer, columns)),
        {**arguments, **own},
        {
            **constants,
            "EXPERTS": call.experts,
            "ROWS": tiles.rows,
            "COLUMNS": columns,
            "DEPTH": deep,
            "SLICES": min(tiles.slices, columns // 16),
            "PRECISION": matrix_precision(call.x.dtype),
        },
        tiles.warps,
        tiles.stages,
        _registers(tiles, inner % deep == 0 and outer % columns == 0),
    )


def hidden_launch(call: RoutedCall, hidden: Tensor, active: Tensor) -> Launch:
    """hidden and active (R, F) by row."""
    arguments: dict[str, Any] = {"x": call.x, "w": call.w_in, "bias": call.b_in, "hidden": hidden}
    arguments |= {"active": active, "depth": call.width}
    constants = {"CHOICES": call.choices, "D": call.width, "F": call.hidden, "ACT": call.act}
    sizes = {"sizes": (call.width, call.hidden)}
    return _products(hidden_kernel, "hidden", call, arguments, {**constants, **sizes})


def rows_launch(call: RoutedCall, active: Tensor, out: Tensor) -> Launch:
    """out (R, D) by place: each row's weighted output."""
    return _rows(call, active, call.w_out, (1, call.hidden), out, call.b_out, call.weight)


def token_gradient_launch(call: RoutedCall, grad_hidden: Tensor, out: Tensor) -> Launch:
    """out (R, D) by place: each row's part of the gradient of x."""
    return _rows(call, grad_hidden, call.w_in, (call.width, 1), out, None, None)


def _rows(
    call: RoutedCall,
    a: Tensor,
    w: Tensor,
    strides: tuple[int, int],
    out: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
) -> Launch:
    arguments = {"a": a, "w": w, "bias": bias, "weight": weight, "out": out}
    constants = {"INNER": call.hidden, "OUTER": call.width}
    constants |= dict(zip(("OF_INNER", "OF_OUTER"), strides, strict=True))
    sizes = {"sizes": (call.hidden, call.width)}
    return _products(rows_kernel, "rows", call, arguments, {**constants, **sizes})


def dot_parts(call: RoutedCall) -> int:
    """Blocks of columns of the hidden gradient, each of which leaves a part of every row's dot."""
    tiles = tiles_of("hidden_gradient", call.x.dtype)
    return _blocks(call.hidden, _chunk(call.hidden, tiles.columns))


def hidden_gradient_launch(
    call: RoutedCall,
    grad_out: Tensor,
    hidden: Tensor,
    grad_hidden: Tensor,
    active: Tensor,
    dots: Tensor,
) -> Launch:
    """grad_hidden and active (R, F) by row; dots (R, dot_parts) in float32."""
    arguments: dict[str, Any] = {"grad_out": grad_out, "w": call.w_out, "weight": call.weight}
    arguments |= {"hidden": hidden, "grad_hidden": grad_hidden, "active": active}
    arguments |= {"dots": dots, "depth": call.width}
    constants = {"CHOICES": call.choices, "D": call.width, "F": call.hidden, "ACT": call.act}
    sizes = {"sizes": (call.width, call.hidden)}
    kernel = hidden_gradient_kernel
    return _products(kernel, "hidden_gradient", call, arguments, {**constants, **sizes})


def choice_gradient_launch(
    call: RoutedCall, dots: Tensor, grad_out: Tensor, grad_weight: Tensor
) -> Launch:
    tile_rows, wide = _CHOICE_TILE
    return Launch(
        choice_gradient_kernel,
        _persistent(call, tile_rows, 1, _EACH_SMALL),
        {
            **{"dots": dots, "grad_out": grad_out, "bias": call.b_out},
            **{"offsets": call.offsets, "permutation": call.permutation},
            **{"grad_weight": grad_weight, "rows": call.rows},
        },
        {
            **{"EXPERTS": call.experts, "CHOICES": call.choices, "D": call.width},
            **{"PARTS": dots.shape[1], "ROWS": tile_rows, "WIDE": _chunk(call.width, wide)},
        },
        4,
        2,
    )


def splits_of(call: RoutedCall) -> int:
    """Shares of an expert's rows in its weight gradients: as many as fill the GPU where tiles alone do not.

    A power of two, being a constant of the kernels: few are compiled where the number of tokens changes.
    """
    tiles = tiles_of("weight_gradient", call.x.dtype)
    across = _blocks(call.hidden, tiles.rows) * _blocks(call.width, tiles.columns)
    wanted = _blocks(_EACH * multiprocessors(call.x.device), call.experts * across)
    splits = min(wanted, _MOST_SPLITS, max(1, call.rows // (call.experts * _SPLIT_ROWS)))
    return 1 << (splits.bit_length() - 1)


def weight_gradient_launch(
    call: RoutedCall,
    left: tuple[Tensor, bool],
    right: tuple[Tensor, bool],
    grad: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
) -> Launch:
    """grad (E, P, splits, Q), bias (E, splits, P); left (., P) and right (., Q) are by token, or else by row."""
    tiles = tiles_of("weight_gradient", call.x.dtype)
    p, splits, q = grad.shape[1:]
    high, wide = _chunk(p, tiles.rows), _chunk(q, tiles.columns)
    down, across = _blocks(p, high), _blocks(q, wide)
    shares = call.experts * splits * down
    of_left, of_right = (call.choices if by_token else 0 for _, by_token in (left, right))
    return Launch(
        weight_gradient_kernel,
        shares * across + (0 if bias is None else shares),
        {
            **{"left": left[0], "right": right[0], "weight": weight},
            **{"offsets": call.offsets, "permutation": call.permutation},
            **{"grad": grad, "bias": bias, "rows": call.rows},
        },
        {
            **{"EXPERTS": call.experts, "LEFT_OF": of_left, "RIGHT_OF": of_right},
            **{"P": p, "Q": q, "SPLITS": splits},
            **{"ROWS": high, "COLUMNS": wide, "DEPTH": tiles.deep},
            "PRECISION": matrix_precision(call.x.dtype),
        },
        tiles.warps,
        tiles.stages,
        _registers(tiles, p % high == 0 and q % wide == 0),
    )


def sum_launch(parts: Tensor, out: Tensor) -> Launch:
    """out (lines, width) of parts (lines, count, width)."""
    lines, count, width = parts.shape
    wide = _chunk(width, 1024)
    high = max(1, _SUM_TILE // wide)
    return Launch(
        sum_kernel,
        _blocks(lines, high) * _blocks(width, wide),
        {"parts": parts, "out": out, "lines": lines},
        {"COUNT": count, "WIDTH": width, "LINES": high, "WIDE": wide},
        4,
        2,
    )
