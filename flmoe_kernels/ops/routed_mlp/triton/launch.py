"""Launches of the routed MLP's kernels with given tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch, matrix_precision, multiprocessors
from flmoe_kernels.core.triton.tables import blocks_of, chunk_of
from flmoe_kernels.ops.routed_mlp.call import RoutedCall

from .kernels import (
    choice_gradient_kernel,
    hidden_gradient_kernel,
    hidden_kernel,
    rows_kernel,
    sum_kernel,
    weight_gradient_kernel,
)
from .table import REGISTERS, Tiles

# Programs per multiprocessor if programs are small.
_EACH_SMALL = 8
# A split of an expert's rows is worth its partial sums from so many rows on; and there are no more than this.
_SPLIT_ROWS, _MOST_SPLITS = 512, 16
# Elements that a program of sum_kernel adds up, and columns of choice_gradient_kernel at a time.
_SUM_TILE, _CHOICE_TILE = 2048, (32, 128)
# Left to itself the compiler spills 8 bytes of choice_gradient_kernel on sm_100 to have 80 registers, not 93; with
# more than 128 three blocks would share an SM, not four.
_UNHURRIED = {100: 128}


def _registers(tiles: Tiles, whole: bool) -> dict[int, int]:
    return REGISTERS if tiles.warps == 8 and tiles.programs == 2 and whole else {}


def _persistent(call: RoutedCall, tile_rows: int, across: int, each: int) -> int:
    """Number of programs that walk tiles: at most the number of tiles possible for any routing."""
    most = (call.rows // tile_rows + call.experts + 1) * across
    return min(each * multiprocessors(call.x.device), most)


def _products(
    kernel: Any,
    tiles: Tiles,
    call: RoutedCall,
    arguments: dict[str, Any],
    constants: dict[str, Any],
) -> Launch:
    """Launch of a persistent product of rows and weights: sum over INNER, OUTER columns of the result."""
    inner, outer = constants.pop("sizes")
    columns, deep = chunk_of(outer, tiles.columns), chunk_of(inner, tiles.deep)
    own = {"offsets": call.offsets, "permutation": call.permutation, "rows": call.rows}
    return Launch(
        kernel,
        _persistent(call, tiles.rows, blocks_of(outer, columns), tiles.programs),
        {**arguments, **own},
        {
            **constants,
            "EXPERTS": call.experts,
            "ROWS": tiles.rows,
            "COLUMNS": columns,
            "DEPTH": deep,
            "SLICES": min(tiles.slices, columns // 16),
            "PRECISION": matrix_precision(call.x.dtype, call.x.device),
        },
        tiles.warps,
        tiles.stages,
        _registers(tiles, inner % deep == 0 and outer % columns == 0),
    )


def _halves(call: RoutedCall, layers: Tensor) -> tuple[Tensor, Tensor | None]:
    """(R, F) of w_in and, for gated experts, of w_gate, from a tensor of layers_shape."""
    return (layers[0], layers[1]) if call.gated else (layers, None)


def _of_experts(w: Tensor, w_gate: Tensor | None) -> dict[str, int]:
    """Elements from one expert's matrix to the next."""
    gate = 0 if w_gate is None else w_gate.stride(0)
    return {"OF_EXPERT": w.stride(0), "GATE_OF_EXPERT": gate}


def hidden_launch(tiles: Tiles, call: RoutedCall, hidden: Tensor, active: Tensor) -> Launch:
    """Launch of hidden (layers_shape) and active (R, F) by row."""
    if call.gated:
        # The tile's columns are those of both matrices.
        tiles = replace(tiles, columns=max(16, tiles.columns // 2))
    own, gate = _halves(call, hidden)
    arguments: dict[str, Any] = {"x": call.x, "w": call.w_in, "bias": call.b_in, "hidden": own}
    arguments |= {"w_gate": call.w_gate, "b_gate": call.b_gate, "gate": gate}
    arguments |= {"active": active, "depth": call.width}
    constants = {"CHOICES": call.choices, "D": call.width, "F": call.hidden, "ACT": call.act}
    constants |= _of_experts(call.w_in, call.w_gate)
    sizes = {"sizes": (call.width, call.hidden)}
    return _products(hidden_kernel, tiles, call, arguments, {**constants, **sizes})


def rows_launch(tiles: Tiles, call: RoutedCall, active: Tensor, out: Tensor) -> Launch:
    """Launch of out (R, D) by place: each row's weighted output. Uses tiles of "rows"."""
    bias_and_weight = (call.b_out, call.weight)
    products = ((active, call.w_out), (None, None))
    return _rows(tiles, call, products, (1, call.hidden), out, bias_and_weight)


def token_gradient_launch(
    tiles: Tiles, call: RoutedCall, grad_hidden: Tensor, out: Tensor
) -> Launch:
    """Launch of out (R, D) by place: each row's part of the gradient of x. Uses tiles of "rows"."""
    own, gate = _halves(call, grad_hidden)
    products = ((own, call.w_in), (gate, call.w_gate))
    return _rows(tiles, call, products, (call.width, 1), out, (None, None))


def _rows(
    tiles: Tiles,
    call: RoutedCall,
    products: tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]],
    strides: tuple[int, int],
    out: Tensor,
    bias_and_weight: tuple[Tensor | None, Tensor | None],
) -> Launch:
    (a, w), (a_gate, w_gate) = products
    bias, weight = bias_and_weight
    arguments = {"a": a, "w": w, "a_gate": a_gate, "w_gate": w_gate}
    arguments |= {"bias": bias, "weight": weight, "out": out}
    constants = {"INNER": call.hidden, "OUTER": call.width, **_of_experts(w, w_gate)}
    constants |= dict(zip(("OF_INNER", "OF_OUTER"), strides, strict=True))
    sizes = {"sizes": (call.hidden, call.width)}
    return _products(rows_kernel, tiles, call, arguments, {**constants, **sizes})


def dot_parts(tiles: Tiles, call: RoutedCall) -> int:
    """Number of column blocks of the hidden gradient; each writes a part of every row's dot product."""
    return blocks_of(call.hidden, chunk_of(call.hidden, tiles.columns))


def hidden_gradient_launch(
    tiles: Tiles,
    call: RoutedCall,
    grad_out: Tensor,
    hidden: Tensor,
    grad_hidden: Tensor,
    active: Tensor,
    dots: Tensor,
) -> Launch:
    """Launch of grad_hidden (layers_shape), active (R, F) by row, and dots (R, dot_parts) in float32."""
    parts = dot_parts(tiles, call)
    if dots.shape[1] != parts:
        # The kernel would write past the end of a buffer made for other tiles.
        raise ValueError(f"dots: expected {parts} blocks of columns, got {dots.shape[1]}")
    if call.gated:
        tiles = replace(tiles, slices=2 * tiles.slices)
    arguments: dict[str, Any] = {"grad_out": grad_out, "w": call.w_out, "weight": call.weight}
    for name, layers in (("", hidden), ("grad_", grad_hidden)):
        arguments[f"{name}hidden"], arguments[f"{name}gate"] = _halves(call, layers)
    arguments |= {"active": active, "dots": dots, "depth": call.width}
    constants = {"CHOICES": call.choices, "D": call.width, "F": call.hidden, "ACT": call.act}
    sizes = {"sizes": (call.width, call.hidden)}
    return _products(hidden_gradient_kernel, tiles, call, arguments, {**constants, **sizes})


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
            **{"PARTS": dots.shape[1], "ROWS": tile_rows, "WIDE": chunk_of(call.width, wide)},
        },
        4,
        2,
        _UNHURRIED,
    )


def splits_of(tiles: Tiles, call: RoutedCall) -> int:
    """Number of splits of an expert's rows in its weight gradients, to fill the GPU if there are few tiles.

    Rounded down to a power of two, so that a few programs do not wait for a second turn.
    """
    fitting = max(1, call.rows // (call.experts * _SPLIT_ROWS))
    splits = min(_wanted_splits(tiles, call), _MOST_SPLITS, fitting)
    return 1 << (splits.bit_length() - 1)


def _wanted_splits(tiles: Tiles, call: RoutedCall) -> int:
    """Number of splits for any number of rows."""
    across = blocks_of(call.hidden, tiles.rows) * blocks_of(call.width, tiles.columns)
    return blocks_of(tiles.programs * multiprocessors(call.x.device), call.experts * across)


def gradient_parts(
    tiles: Tiles, call: RoutedCall, grad: Tensor | None, bias: Tensor | None, splits: int
) -> tuple[Tensor | None, Tensor | None]:
    """Parts (E, P, splits, Q) and (E, splits, P) in float32 of the gradients grad (E, P, Q) and bias (E, P).

    They are empty without splits, so that fewer rows have the same kernel, and None if no number of rows is split.
    """

    def parts(x: Tensor | None, place: int) -> Tensor | None:
        if x is None or (splits == 1 and _wanted_splits(tiles, call) == 1):
            return None
        experts, *shape = x.shape
        shape.insert(place, splits)
        return x.new_empty((experts * (splits > 1), *shape), dtype=torch.float32)

    return parts(grad, 1), parts(bias, 0)


def weight_gradient_launch(
    tiles: Tiles,
    call: RoutedCall,
    left: tuple[Tensor, bool],
    right: tuple[Tensor, bool],
    results: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    splits: int,
    weight: Tensor | None,
) -> Launch:
    """Launch of the gradients grad (E, P, Q) and bias (E, P), None if not wanted, or of their parts (see
    gradient_parts), the last two results; left (., P) and right (., Q) are by token or row."""
    p, q = left[0].shape[1], right[0].shape[1]
    grad, bias, parts, bias_parts = results
    if call.x.dtype == torch.float32:
        # Parts have the type of the gradients, so the kernel needs no second place to store.
        grad, bias = (parts, bias_parts) if splits > 1 else (grad, bias)
        parts = bias_parts = None
    high, wide = chunk_of(p, tiles.rows), chunk_of(q, tiles.columns)
    down, across = blocks_of(p, high), blocks_of(q, wide)
    shares = call.experts * splits * down
    of_left, of_right = (call.choices if by_token else 0 for _, by_token in (left, right))
    return Launch(
        weight_gradient_kernel,
        (0 if grad is None else shares * across) + (0 if bias is None else shares),
        {
            **{"left": left[0], "right": right[0], "weight": weight},
            **{"offsets": call.offsets, "permutation": call.permutation},
            **{"grad": grad, "bias": bias, "parts": parts, "bias_parts": bias_parts},
            **{"rows": call.rows, "splits": splits},
        },
        {
            **{"EXPERTS": call.experts, "LEFT_OF": of_left, "RIGHT_OF": of_right},
            **{"P": p, "Q": q},
            **{"ROWS": high, "COLUMNS": wide, "DEPTH": tiles.deep},
            "PRECISION": matrix_precision(call.x.dtype, call.x.device),
        },
        tiles.warps,
        tiles.stages,
        _registers(tiles, p % high == 0 and q % wide == 0),
    )


def sum_launch(parts: Tensor, out: Tensor, *, splits: bool = False) -> Launch:
    """Launch of out (lines, width), the sum of parts (lines, count, width) over count, which is a constant of the
    kernel unless it is a number of splits."""
    lines, count, width = parts.shape
    wide = chunk_of(width, 1024)
    high = max(1, _SUM_TILE // wide)
    return Launch(
        sum_kernel,
        blocks_of(lines, high) * blocks_of(width, wide),
        {"parts": parts, "out": out, "lines": lines, "splits": count},
        {"COUNT": 0 if splits else count, "WIDTH": width, "LINES": high, "WIDE": wide},
        4,
        2,
    )
