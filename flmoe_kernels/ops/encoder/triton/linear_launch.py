"""Launches of expert_linear's kernels: allocation, tiles, splits of rows.

torch.bmm is not used: at the sizes of a layer these products are bound by memory, and a bias added after it reads
and writes the result again, while here a tile adds it before its only store. A weight's gradient is a sum over
many rows into few tiles, fewer than an H100 has multiprocessors. Here its rows are split over at most _PROGRAMS
programs, which all run at the same time; their partial sums fit into L2. The same kernel computes the gradient of
the bias; a separate sum would read grad_out again. The order of sums depends only on shapes, not on the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch, matrix_precision
from flmoe_kernels.core.triton.tables import AMD, Table, architecture_of, blocks_of, chunk_of

from .linear_kernels import product_kernel, sum_kernel, weight_gradient_kernel
from .rows_launch import Dropout
from .view_rows import ALL, ViewRows

# How a kernel reads rows (E, rows, width): the tensor, and elements from one row to the next.
Operand = tuple[Tensor, int]

# Rows with a larger stride are copied, so that offsets within a block stay below 2^31.
MAX_STRIDE = 2**24
# Number of elements per program of sum_kernel.
_SUM_BLOCK = 1024


@dataclass(frozen=True)
class Tiles:
    """Tile of results, chunk of the summed dimension, slices of the epilogue, warps, stages.

    shared: maximum bytes per block on sm_80, sm_90 and sm_100 at the named shapes, in the compiled cases,
    with Triton 3.7.1; tests/bench/test_aot.py checks them. registers: maximum number per thread, by
    architecture.
    """

    rows: int
    columns: int
    deep: int
    slices: int
    warps: int
    stages: int
    shared: tuple[int, int, int]
    registers: Mapping[int, int] = field(default_factory=dict)


# (kernel, class of the call) -> tiles, the same for every architecture, as in routed_mlp/triton/table.py; not
# measured. sm_90 reads operands from shared memory and fits 128 registers, two blocks; sm_80 holds them in
# registers: there a block has the SM to itself, which the compiler must be told for the product, or it takes 128
# and spills. "ragged" is for widths that are no whole tiles, whose masks and addresses take registers: half as
# deep they do not spill, and a block has the SM to itself.
TABLE = {
    ("product", "16 bit"): Tiles(128, 128, 64, 4, 8, 3, (65536, 98304, 98320), {80: 168, 90: 128}),
    ("weight_gradient", "16 bit"): Tiles(128, 128, 64, 1, 8, 3, (65536, 100352, 100384), {90: 128}),
    ("product", "ragged"): Tiles(128, 128, 32, 4, 8, 3, (24576, 32768, 40976)),
    ("weight_gradient", "ragged"): Tiles(128, 128, 32, 1, 8, 3, (65536, 65536, 33824)),
    ("product", "float32"): Tiles(64, 64, 32, 2, 4, 3, (32768, 49152, 49160)),
    ("weight_gradient", "float32"): Tiles(64, 64, 32, 1, 4, 3, (32768, 53248, 53256)),
}
# The tiles of ("weight_gradient", "16 bit") with a norm of right. On sm_80 half the depth does not spill; AMD has
# 64 KiB, which one stage less fits.
NORM_TILES = Table(
    {"16 bit": Tiles(128, 128, 64, 1, 8, 3, (0, 101376, 101408), {90: 128})},
    {
        80: {"16 bit": Tiles(128, 128, 32, 1, 8, 2, (65536, 0, 0))},
        86: {"16 bit": Tiles(128, 128, 32, 1, 8, 2, (65536, 0, 0))},
        AMD: {"16 bit": Tiles(128, 128, 64, 1, 8, 2, (0, 0, 0))},
    },
)

# Programs of the weight gradient: two on each of an H100's SMs. A share is worth its partial sums from so many
# rows on. In float32 it has no more than the last number, which is 128 chunks: one sum over all rows in order
# would be rounded 1548 times at mmimdb. The parts of that are 41 MB (768 x 256), a twentieth of what is read.
_PROGRAMS, _LEAST_ROWS, _MOST_ROWS_FLOAT32 = 264, 256, 4096


def tiles_of(kernel: str, dtype: torch.dtype, first: int, columns: int) -> Tiles:
    return TABLE[kernel, class_of(kernel, dtype, first, columns)]


def class_of(kernel: str, dtype: torch.dtype, first: int, columns: int) -> str:
    """The class in TABLE for two widths: INNER and OUTER of a product, P and Q of a weight's gradient."""
    if dtype == torch.float32:
        return "float32"
    tiles = TABLE[kernel, "16 bit"]
    most = tiles.deep if kernel == "product" else tiles.rows
    whole = first % chunk_of(first, most) == 0 and columns % chunk_of(columns, tiles.columns) == 0
    return "16 bit" if whole else "ragged"


def operand(x: Tensor) -> Operand:
    """The rows in place, or a copy if the kernels cannot read them in place.

    The rows of all experts have one stride, which does not depend on their number, so that kernels may be
    specialized on it.
    """
    experts, rows, width = x.shape
    if x.is_contiguous():
        return x, width
    regular = x.stride(2) == 1 or width == 1
    regular &= x.stride(0) == rows * x.stride(1) or experts == 1
    if regular and x.stride(1) <= MAX_STRIDE:
        return x, x.stride(1)
    return x.contiguous(), width


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    computed: ViewRows = ALL,
    added: tuple[Tensor | None, Dropout] | None = None,
) -> tuple[Tensor, list[Launch]]:
    """Allocate out (E, R, N) for x (E, R, K), weight (E, N, K), bias (E, N); also return its launches.

    added: a contiguous residual (E, R, N) or None, and a dropout. out is then residual + dropout(y), y the linear
    map. Without a residual: u + dropout(u) with u = dropout(y), as the published layer does.
    """
    out = x.new_empty((*x.shape[:2], weight.shape[1]))
    bias = None if bias is None else bias.contiguous()
    strides = (1, weight.shape[2])
    return out, [_product(operand(x), weight.contiguous(), strides, bias, out, computed, added)]


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    computed: ViewRows = ALL,
    *,
    zeros: bool = True,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Allocate gradients of x, weight and bias (empty if not requested); also return their launches.

    zeros: store zeros in the other rows of the gradient of x; if False, they are not written. Additional memory:
    the partial sums of weights and biases in float32, see shares_of.
    """
    found = []
    grad_x = x.new_empty(x.shape if want_x else (0,))
    if want_x:
        left, strides = operand(grad_out), (weight.shape[2], 1)
        weights = weight.contiguous()
        found.append(_product(left, weights, strides, None, grad_x, computed, zeros=zeros))
    grads, more = weight_backward(grad_out, x, weight, want_weight, want_bias, computed)
    return (grad_x, *grads), found + more


def weight_backward(
    grad_out: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    want_weight: bool,
    want_bias: bool,
    computed: ViewRows = ALL,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Allocate gradients of weight (E, P, Q) and bias (E, P) (empty if not requested); also return their launches.

    norm: mean, rstd, gain and shift of a norm between x and the map. What is not read may be None.
    """
    of_weight = weight.new_empty(weight.shape if want_weight else (0,))
    of_bias = weight.new_empty(weight.shape[:2] if want_bias else (0,))
    if not (of_weight.numel() or of_bias.numel()):
        return (of_weight, of_bias), []
    grad = of_weight if of_weight.numel() else None
    bias = of_bias if of_bias.numel() else None
    assert grad_out is not None
    left = right = operand(grad_out)
    q = 0
    if grad is None:
        norm = None
    else:
        assert x is not None
        right, q = operand(x), x.shape[2]
    experts, rows, p = grad_out.shape
    shares = shares_of(grad_out.dtype, experts, rows, p, q)
    # Without shares the parts are empty; the kernel is the same, so that it is not compiled for fewer rows.
    stored, float32 = experts * (shares > 1), torch.float32
    parts = None if grad is None else weight.new_empty((stored, shares, p, q), dtype=float32)
    bias_parts = None if bias is None else weight.new_empty((stored, shares, p), dtype=float32)
    results = {"grad": grad, "bias": bias, "parts": parts, "bias_parts": bias_parts}
    tiles = tiles_of("weight_gradient", grad_out.dtype, p, q)
    if norm is not None and tiles is TABLE["weight_gradient", "16 bit"]:
        tiles = NORM_TILES.tiles("16 bit", architecture_of(weight.device))
    high, wide = chunk_of(p, tiles.rows), chunk_of(q, tiles.columns)
    across = max(1, blocks_of(q, wide))
    product = Launch(
        weight_gradient_kernel,
        experts * shares * blocks_of(p, high) * across,
        {
            **{"left": left, "right": right, **results},
            **dict(zip(("mean", "rstd", "gain", "shift"), norm or 4 * (None,), strict=True)),
            **{"splits": shares, **computed.arguments(rows)},
        },
        {
            **{"P": p, "Q": q, "ACROSS": across, "ROWS": high, "COLUMNS": wide},
            **{"DEPTH": tiles.deep, "PRECISION": matrix_precision(weight.dtype, weight.device)},
        },
        tiles.warps,
        tiles.stages,
        tiles.registers,
    )
    if shares == 1:
        return (of_weight, of_bias), [product]
    widths = [0 if grad is None else p * q, 0 if bias is None else p]
    total = Launch(
        sum_kernel,
        experts * sum(blocks_of(width, _SUM_BLOCK) for width in widths),
        {**results, "splits": shares, "experts": experts},
        {"GRAD": widths[0], "BIAS": widths[1], "BLOCK": _SUM_BLOCK},
        4,
        2,
    )
    return (of_weight, of_bias), [product, total]


def _product(
    a: Operand,
    weight: Tensor,
    strides: tuple[int, int],
    bias: Tensor | None,
    out: Tensor,
    computed: ViewRows,
    added: tuple[Tensor | None, Dropout] | None = None,
    *,
    zeros: bool = False,
) -> Launch:
    """Launch of out (E, R, OUTER) from a (E, R, INNER); strides of the weights over INNER and OUTER."""
    residual, dropout = added or (None, Dropout(None, 0.0))
    twice = added is not None and residual is None
    experts, rows, inner = a[0].shape
    outer, sizes = out.shape[2], computed.arguments(rows)
    tiles = tiles_of("product", out.dtype, inner, outer)
    columns, deep = chunk_of(outer, tiles.columns), chunk_of(inner, tiles.deep)
    blocks = computed.views * blocks_of(sizes["rows"], tiles.rows)
    return Launch(
        product_kernel,
        experts * blocks * blocks_of(outer, columns),
        {
            **{"a": a, "w": weight, "bias": bias, "residual": residual, "out": out},
            **{"depth": inner, **sizes, **dropout.arguments()},
        },
        {
            "TWICE": twice,
            **{"INNER": inner, "OUTER": outer, "OF_INNER": strides[0], "OF_OUTER": strides[1]},
            **{"ROWS": tiles.rows, "COLUMNS": columns, "DEPTH": deep},
            "SLICES": min(tiles.slices, columns // 16),
            "PRECISION": matrix_precision(out.dtype, out.device),
            "ZEROS": zeros and computed.count is not None,
        },
        tiles.warps,
        tiles.stages,
        {} if twice else tiles.registers,  # two masks would spill
    )


def shares_of(dtype: torch.dtype, experts: int, rows: int, p: int, q: int) -> int:
    """Number of splits of an expert's rows in gradients (E, P, Q): enough for all programs that run at once."""
    tiles = tiles_of("weight_gradient", dtype, p, q)
    across = blocks_of(p, chunk_of(p, tiles.rows)) * max(
        1, blocks_of(q, chunk_of(q, tiles.columns))
    )
    fewest = blocks_of(rows, _MOST_ROWS_FLOAT32) if dtype == torch.float32 else 1
    return max(1, fewest, min(_PROGRAMS // max(1, experts * across), rows // _LEAST_ROWS))
