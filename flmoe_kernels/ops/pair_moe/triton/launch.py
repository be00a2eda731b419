"""Launches of pair_moe's kernels with given tiles, for `readable` calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.operands import contiguous
from flmoe_kernels.core.triton.launches import Launch, compiles_to_ptx, matrix_precision
from flmoe_kernels.core.triton.tables import blocks_of, chunk_of
from flmoe_kernels.ops.pair_moe.call import REDUCE_EXPERTS, REDUCE_NONE, REDUCE_POOL, PairCall
from flmoe_kernels.ops.pair_moe.kinds import coefficients_of

from .kernels import accumulate_kernel, gradient_kernel, project_kernel
from .map_kernels import map_kernel
from .table import Tiles

# How a kernel reads or writes (B, E, L, width), and S1, S2, S3 of every expert.
Operand = tuple[Tensor, int, int, int]
Coefficients = tuple[tuple[float, ...], ...]

# Tokens with a larger stride are copied, so that offsets within a block stay below 2^31.
_MAX_STRIDE = 2**24


def readable(call: PairCall) -> PairCall:
    """The call with copies of the inputs that kernels cannot read in place."""
    return dataclasses.replace(
        call,
        q=_rows_contiguous(call.q),
        k=_rows_contiguous(call.k),
        a=_rows_contiguous(call.a),
        c=_rows_contiguous(call.c),
        gate_bias=contiguous(call.gate_bias),
        mask_a=contiguous(call.mask_a),
        mask_b=contiguous(call.mask_b),
    )


def _rows_contiguous(x: Tensor) -> Tensor:
    scattered = x.stride(-1) != 1 and x.shape[-1] > 1
    return x.contiguous() if scattered or x.stride(-2) > _MAX_STRIDE else x


def operand(x: Tensor) -> Operand:
    return x, x.stride(0), x.stride(1), x.stride(2)


def spread(x: Tensor, call: PairCall, reduce: str, length: int) -> Operand:
    """Expand the gradient of y, or a head (as for "pool"), to (B, E, length, V) without copies."""
    x = _rows_contiguous(x)
    if reduce != REDUCE_NONE:
        x = x.unsqueeze(1 if reduce == REDUCE_EXPERTS else 2)
    return operand(x.expand(call.batch, call.experts, length, call.width))


def _gate_constants(call: PairCall, tiles: Tiles) -> dict[str, Any]:
    return {
        "TOP_K": call.top_k,
        "R": call.rank,
        "V": call.width,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH_R": chunk_of(call.rank, tiles.deep),
        "PRECISION": matrix_precision(call.q.dtype, call.q.device),
        "PTX": compiles_to_ptx(call.q.device),
    }


def lanes_of(tiles: Tiles) -> int:
    """LANES of tiles.lane_sums: four threads of a warp share a row, and warps without 16 rows of their own divide
    the columns."""
    warps = max(1, 16 * tiles.warps // tiles.rows)
    return tiles.lanes or min(4 * warps, tiles.columns // 2)


def _coefficients(call: PairCall) -> Coefficients:
    return tuple(zip(*coefficients_of(call.kinds), strict=True))


def _gate_operands(call: PairCall, swapped: bool) -> tuple[Operand, Operand, Any, Any]:
    """Return q, k and their masks, or k, q and their masks if the kernel's rows are the tokens of side b."""
    q, k = operand(call.q), operand(call.k)
    return (k, q, call.mask_b, call.mask_a) if swapped else (q, k, call.mask_a, call.mask_b)


def row_blocks(tiles: Tiles, call: PairCall) -> int:
    """Number of blocks of side a, which is also the number of partial sums that a kernel writes."""
    return blocks_of(call.rows, tiles.rows)


def _expect_blocks(name: str, found: int, blocks: int) -> None:
    """Check a buffer of partial sums: kernels would write past the end of a buffer made for other tiles."""
    if found != blocks:
        raise ValueError(f"{name}: expected partial sums of {blocks} blocks, got {found}")


def forward_launch(tiles: Tiles, call: PairCall, reduce: str, y: Tensor, mass: Tensor) -> Launch:
    """Launch of y (B, E, La, V), (B, La, V), or for "pool" partial sums (B, E, row_blocks, V) in float32."""
    if reduce == REDUCE_POOL:
        _expect_blocks("y", y.shape[2], row_blocks(tiles, call))
    return _accumulate(
        tiles,
        call,
        operand(y.unsqueeze(1) if reduce == REDUCE_EXPERTS else y),
        (operand(call.a), operand(call.c)),
        _coefficients(call),
        reduce=reduce,
        mass=mass,
    )


def _accumulate(
    tiles: Tiles,
    call: PairCall,
    out: Operand,
    values: tuple[Operand | None, Operand | None],
    coefficients: Coefficients,
    *,
    reduce: str = REDUCE_NONE,
    mass: Tensor | None = None,
    swapped: bool = False,
) -> Launch:
    wide = chunk_of(call.width, tiles.wide)
    sides = _gate_operands(call, swapped)
    rows, columns = sides[0][0].shape[2], sides[1][0].shape[2]
    return Launch(
        accumulate_kernel,
        blocks_of(rows, tiles.rows) * blocks_of(call.width, wide) * call.batch,
        {
            **dict(zip(("q", "k", "mask_a", "mask_b"), sides, strict=True)),
            **{"a": values[0], "c": values[1], "bias": call.gate_bias},
            **{"out": out, "mass": mass, "rows": rows, "columns": columns, "scale": call.scale},
        },
        {
            **_gate_constants(call, tiles),
            **dict(zip(("S1", "S2", "S3"), coefficients, strict=True)),
            **{"REDUCE": reduce, "WIDE_V": wide, "LANES": lanes_of(tiles)},
            "HELD": tiles.held,
        },
        tiles.warps,
        tiles.stages,
    )


@dataclass(frozen=True)
class Sides:
    """The parts of a pair's value that belong to one token, see project_kernel: value = offset_i + offset_j
    + factor_i . c_j. product, has_i, has_j: the experts for which the product and the offsets are not 0."""

    offset_i: Tensor
    offset_j: Tensor | None
    factor: Tensor | None
    product: tuple[bool, ...]
    has_i: tuple[bool, ...]
    has_j: tuple[bool, ...]


def make_sides(call: PairCall, reduce: str, dtype: torch.dtype, *, of_mass: bool = False) -> Sides:
    """Uninitialised sides for a gradient of y with this `reduce` and, `of_mass`, of mass; factors in `dtype`."""
    s1, s2, s3 = _coefficients(call)
    pool = reduce == REDUCE_POOL
    # If the gradient is the same for every i, c_j's part depends only on c_j, unless it is multiplied by a_i.
    product = tuple(
        third > 0 or (second > 0 and not pool) for second, third in zip(s2, s3, strict=True)
    )
    offset_i = call.a.new_empty(call.a.shape[:3], dtype=torch.float32)
    offset_j = call.c.new_empty(call.c.shape[:3], dtype=torch.float32) if pool else None
    factor = call.a.new_empty(call.a.shape, dtype=dtype) if any(product) else None
    has_i = tuple(of_mass or first > 0 for first in s1)
    has_j = tuple(pool and second > 0 for second in s2)
    return Sides(offset_i, offset_j, factor, product, has_i, has_j)


def project_launches(
    call: PairCall, reduce: str, cotangent: Tensor, grad_mass: Tensor | None, sides: Sides
) -> list[Launch]:
    s1, s2, s3 = _coefficients(call)
    none = (0.0,) * call.experts
    pool = reduce == REDUCE_POOL
    rows, wide, warps = 32, chunk_of(call.width, 64), 4

    def launch(x: Tensor, mask: Tensor | None, offset: Tensor, **rest: Any) -> Launch:
        length = x.shape[2]
        return Launch(
            project_kernel,
            blocks_of(length, rows) * call.batch,
            {
                "x": operand(x),
                "g": spread(cotangent, call, reduce, length),
                "base": rest["base"],
                "mask": mask,
                "offset": offset,
                "factor": rest["factor"],
                "length": length,
            },
            {
                **{name: rest[name] for name in ("C0", "C1", "C2")},
                **{"V": call.width, "ROWS": rows, "WIDE_V": wide},
            },
            warps,
            1,
        )

    factor = None if sides.factor is None else operand(sides.factor)
    own = {"base": grad_mass, "factor": factor}
    launches = [
        launch(call.a, call.mask_a, sides.offset_i, C0=s1, C1=none if pool else s2, C2=s3, **own)
    ]
    if sides.offset_j is not None:
        other = {"C0": s2, "C1": none, "C2": none, "base": None, "factor": None}
        launches.append(launch(call.c, call.mask_b, sides.offset_j, **other))
    return launches


@dataclass(frozen=True)
class Own:
    """Gradient of a or c: the operands and S1, S2, S3 of its sum, see accumulate_kernel."""

    grad: Operand
    values: tuple[Operand | None, Operand | None]
    coefficients: Coefficients


def backward_launches(
    sums: Tiles,
    gates: Tiles,
    call: PairCall,
    reduce: str,
    grad_y: Tensor,
    sides: Sides,
    grads: Sequence[Tensor | None],
    grad_bias: Tensor | None,
) -> list[Launch]:
    """Launches of the gradients of q, k, a, c, and of partial sums (B, row_blocks, E) for gate_bias; None if not
    wanted. One launch computes those of q, a and gate_bias, another those of k and c, if `together`.

    sums: "accumulate" tiles; gates: "gradient" tiles, which determine the blocks of grad_bias.

    grad_a_i = s1 g_i sum_j p + s3 g_i * sum_j p c_j
    grad_c_j = sum_i p factor_i [+ s2 g sum_i p, where g is the same for every i]
    """
    s1, s2, s3 = _coefficients(call)
    none = (0.0,) * call.experts
    pool = reduce == REDUCE_POOL
    factor = None if sides.factor is None else operand(sides.factor)
    grad_q, grad_k, grad_a, grad_c = (None if g is None else operand(g) for g in grads)
    g_a = spread(grad_y, call, reduce, call.rows)
    g_c = spread(grad_y, call, reduce, call.columns) if pool else None
    added = tuple(float(product) for product in sides.product)
    of_a = None if grad_a is None else Own(grad_a, (g_a, operand(call.c)), (s1, none, s3))
    of_c = (
        None if grad_c is None else Own(grad_c, (g_c, factor), (s2 if pool else none, added, none))
    )
    launches = []
    for swapped, grad, bias, own in (
        (False, grad_q, grad_bias, of_a),
        (True, grad_k, None, of_c),
    ):
        fused = own if own is not None and together(gates, call, own.coefficients) else None
        if grad is not None or bias is not None or fused is not None:
            launches.append(gradient_launch(gates, call, sides, grad, bias, fused, swapped=swapped))
        if own is not None and fused is None:
            launches.append(
                _accumulate(sums, call, own.grad, own.values, own.coefficients, swapped=swapped)
            )
    return launches


def together(tiles: Tiles, call: PairCall, coefficients: Coefficients) -> bool:
    """Whether gradient_kernel also computes the gradient of a or c: if its sums fit, and its chunks of V need no
    gates of their own. Does not depend on which gradients are wanted, so that they have the same bits."""
    wide_r, wide_v = chunk_of(call.rank, tiles.wide), chunk_of(call.width, tiles.wide)
    products = sum(second + third > 0 for _, second, third in zip(*coefficients, strict=True))
    fits = call.experts * wide_r + products * wide_v <= tiles.sums
    return fits and blocks_of(call.width, wide_v) <= blocks_of(call.rank, wide_r)


def gradient_launch(
    tiles: Tiles,
    call: PairCall,
    sides: Sides,
    grad: Operand | None,
    grad_bias: Tensor | None,
    own: Own | None = None,
    *,
    swapped: bool = False,
) -> Launch:
    """Launch of the gradient of q and (B, row_blocks, E) partial sums for gate_bias, or (swapped) that of k, and
    of `own`, the gradient of a or (swapped) of c; None if not wanted."""
    wide_r, wide_v = chunk_of(call.rank, tiles.wide), chunk_of(call.width, tiles.wide)
    chunks = max(
        1 if grad is None else blocks_of(call.rank, wide_r),
        1 if own is None else blocks_of(call.width, wide_v),
    )
    gates = _gate_operands(call, swapped)
    values = [None if sides.factor is None else operand(sides.factor), operand(call.c)]
    offsets = [sides.offset_i, sides.offset_j]
    has = [sides.has_i, sides.has_j]
    if swapped:
        values.reverse()
        offsets.reverse()
        has.reverse()
    rows, columns = gates[0][0].shape[2], gates[1][0].shape[2]
    if grad_bias is not None:
        _expect_blocks("grad_bias", grad_bias.shape[1], blocks_of(rows, tiles.rows))
    none = (0.0,) * call.experts
    coefficients = (none,) * 3 if own is None else own.coefficients
    return Launch(
        gradient_kernel,
        blocks_of(rows, tiles.rows) * chunks * call.batch,
        {
            **dict(zip(("x", "z", "mask_x", "mask_z"), gates, strict=True)),
            **{"u": values[0], "w": values[1], "bias": call.gate_bias},
            "own": None if own is None else own.values[0],
            **{"offset_x": offsets[0], "offset_z": offsets[1]},
            **{"grad_x": grad, "grad_bias": grad_bias},
            "grad_own": None if own is None else own.grad,
            **{"length_x": rows, "length_z": columns, "scale": call.scale},
        },
        {
            **_gate_constants(call, tiles),
            **dict(zip(("S1", "S2", "S3"), coefficients, strict=True)),
            **{"PRODUCT": sides.product, "OFFSET_X": has[0], "OFFSET_Z": has[1]},
            **{"DEPTH_V": chunk_of(call.width, tiles.deep), "LANES": lanes_of(tiles)},
            "HELD": tiles.held,
            **{"WIDE_R": wide_r, "WIDE_V": wide_v},
        },
        tiles.warps,
        tiles.stages,
    )


def map_launch(
    tiles: Tiles, call: PairCall, sides: Sides, out: Tensor, first: int, end: int
) -> Launch:
    """Launch for rows first to end: out is phi (B, E, rows, Lb) float32, or keys (B, E + 1, rows, Lb) int64."""
    return Launch(
        map_kernel,
        blocks_of(end - first, tiles.rows) * blocks_of(call.columns, tiles.columns) * call.batch,
        {
            **{"q": operand(call.q), "k": operand(call.k), "c": operand(call.c)},
            "u": None if sides.factor is None else operand(sides.factor),
            "offset_i": sides.offset_i,
            "offset_j": sides.offset_j,
            "bias": call.gate_bias,
            "mask_a": call.mask_a,
            "mask_b": call.mask_b,
            "out": out,
            "first": first,
            "end": end,
            "rows": call.rows,
            "columns": call.columns,
            "scale": call.scale,
        },
        {
            **_gate_constants(call, tiles),
            **{"PRODUCT": sides.product, "OFFSET_X": sides.has_i, "OFFSET_Z": sides.has_j},
            "KEYS": out.dtype == torch.int64,
            "DEPTH_V": chunk_of(call.width, tiles.deep),
        },
        tiles.warps,
        tiles.stages,
    )
