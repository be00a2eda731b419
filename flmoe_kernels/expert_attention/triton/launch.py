"""How the kernels of expert_attention are launched: tiles, warps, operands. Calls have been made `readable`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...dropout import DRAWS, keep_scale, keep_threshold
from ...triton_runtime import Launch, matrix_precision
from .kernels import attend_kernel, key_gradient_kernel, query_gradient_kernel

# What a kernel reads or writes (G, rows, H, d) through.
Operand = tuple[Tensor, int, int, int]

# Rows further apart than this are copied, so that offsets within a block stay below 2^31.
_MAX_STRIDE = 2**24
# Problems of up to this many rows on average take the smallest tiles.
_SHORT = 16
_WIDEST = 128
# Below this a scale times log2(e) may be 0 in float32, or become it; 0 times the -inf of a masked score is NaN.
_LEAST_FACTOR = 1e-37


@dataclass(frozen=True)
class AttentionCall:
    """The inputs of one call: q, k, v (G, rows, H, d); seed None means no dropout."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    seed: Tensor | None
    dropout_p: float
    scale: float

    @property
    def problems(self) -> int:
        return self.cu_seqlens.numel() - 1


@dataclass(frozen=True)
class Tiles:
    """Tile of scores, warps, pipeline stages.

    shared: bytes per block on sm_80, sm_90 and sm_100 at the named shapes, the largest of the cases compiled;
    with Triton 3.7.1, whose numbers the static test holds this table to.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    shared: tuple[int, int, int]


# (kernel, class of the call) -> tiles, the same for every architecture. 64 rows give each of four warps the 16
# that its matrix instruction takes, and sm_90's the 64 of its group, so that scores stay in the registers where
# they were made; with more warps each row is held twice. 64 columns: a tile of 128 would use all four words of a
# dropout counter (17 instead of 21 instructions per score in sm_90's first kernel), but its gradient kernels spill
# on two or three of the architectures, and the first one on sm_100. Two blocks share an SM: 255 registers and the
# shared memory allow it. "wide" is for widths over 64, where a tile of rows has twice the bytes: half the columns
# in "query_gradient"; half the rows in "key_gradient", whose sums alone are 128 registers, which leaves its scores
# to mma.sync on every architecture. "short" is for problems of at most 16 rows on average: a warp and a tile for
# each problem and head. float32 products are three TF32 ones, of operands that are split in two: 32 x 32 is what
# does not spill at width 64. "chunked" is for widths over 128, whose rows pass in chunks of 128 columns. Tiles of
# wide float32 and of chunked rows are smaller for the registers and the shared memory: at widths 128 and 256 up
# to 32 bytes per thread spill in 16 bit and up to 112 in float32, and no block takes more than the 99 KiB that
# sm_86 and sm_89 have. Which is faster has not been measured.
TABLE = {
    ("attend", "long"): Tiles(64, 64, 4, 2, (24576, 40960, 41000)),
    ("query_gradient", "long"): Tiles(64, 64, 4, 3, (49152, 65536, 73792)),
    ("key_gradient", "long"): Tiles(64, 64, 4, 2, (41472, 57856, 74312)),
    ("attend", "wide"): Tiles(64, 64, 4, 2, (57344, 81920, 81960)),
    ("query_gradient", "wide"): Tiles(64, 32, 4, 2, (53248, 73728, 77880)),
    ("key_gradient", "wide"): Tiles(32, 64, 4, 2, (53504, 53504, 51464)),
    ("attend", "chunked"): Tiles(64, 32, 4, 1, (45056, 40960, 40968)),
    ("query_gradient", "chunked"): Tiles(32, 32, 4, 1, (43008, 43008, 43008)),
    ("key_gradient", "chunked"): Tiles(32, 32, 4, 1, (51200, 51200, 51200)),
    ("attend", "short"): Tiles(16, 16, 1, 2, (3072, 3072, 3072)),
    ("query_gradient", "short"): Tiles(16, 16, 1, 1, (3584, 3584, 3584)),
    ("key_gradient", "short"): Tiles(16, 16, 1, 1, (4096, 4096, 4096)),
    ("attend", "float32"): Tiles(32, 32, 4, 1, (24576, 24576, 24576)),
    ("query_gradient", "float32"): Tiles(32, 32, 4, 1, (40960, 40960, 40960)),
    ("key_gradient", "float32"): Tiles(32, 32, 4, 1, (49152, 49152, 49152)),
    ("attend", "float32, wide"): Tiles(32, 32, 4, 1, (49152, 49152, 49152)),
    ("query_gradient", "float32, wide"): Tiles(32, 16, 4, 1, (73728, 73728, 73728)),
    ("key_gradient", "float32, wide"): Tiles(16, 32, 4, 1, (81920, 81920, 81920)),
    ("attend", "float32, chunked"): Tiles(32, 16, 4, 1, (73728, 73728, 73728)),
    ("query_gradient", "float32, chunked"): Tiles(16, 16, 4, 1, (73728, 73728, 73728)),
    ("key_gradient", "float32, chunked"): Tiles(16, 16, 4, 1, (73728, 73728, 73728)),
    ("attend", "float32, short"): Tiles(16, 16, 1, 1, (6144, 6144, 6144)),
    ("query_gradient", "float32, short"): Tiles(16, 16, 1, 1, (10240, 10240, 10240)),
    ("key_gradient", "float32, short"): Tiles(16, 16, 1, 1, (12288, 12288, 12288)),
}


def tiles_of(kernel: str, call: AttentionCall) -> Tiles:
    return TABLE[kernel, class_of(call)]


def class_of(call: AttentionCall) -> str:
    """The rows of TABLE for a call: by dtype, width and mean length, which is all that shapes tell."""
    width = call.q.shape[3]
    if width > 64:
        size = "wide" if width <= _WIDEST else "chunked"
    else:
        size = "short" if call.q.shape[1] <= _SHORT * call.problems else "long"
    if call.q.dtype != torch.float32:
        return size
    return "float32" if size == "long" else f"float32, {size}"


def readable(call: AttentionCall) -> AttentionCall:
    """The call with copies of those inputs that kernels cannot read where they are."""
    dropping = call.seed is not None and keep_threshold(call.dropout_p) < DRAWS
    return replace(
        call,
        q=rows_contiguous(call.q),
        k=rows_contiguous(call.k),
        v=rows_contiguous(call.v),
        cu_seqlens=call.cu_seqlens.contiguous(),
        seed=call.seed if dropping else None,
    )


def rows_contiguous(x: Tensor) -> Tensor:
    scattered = x.stride(3) != 1 and x.shape[3] > 1
    return x.contiguous() if scattered or x.stride(1) > _MAX_STRIDE else x


def operand(x: Tensor) -> Operand:
    return x, x.stride(0), x.stride(1), x.stride(2)


def chunk_of(width: int) -> int:
    """The columns that a program holds of a width; a matrix product takes no less than 16."""
    return min(_WIDEST, max(16, 1 << (width - 1).bit_length()))


def _launch(
    kernel: Any, name: str, call: AttentionCall, block: str, rest: dict[str, Any]
) -> Launch:
    """A launch with a program for each slot of a block of rows (or columns) and each chunk, head and group."""
    groups, rows, heads, width = call.q.shape
    tiles, chunk = tiles_of(name, call), chunk_of(width)
    slots = rows // getattr(tiles, block) + call.problems + 2
    dropping = call.seed is not None
    arguments = {
        **{"q": operand(call.q), "k": operand(call.k), "v": operand(call.v)},
        **{"cu": call.cu_seqlens, "seed": call.seed, **rest},
        **{"problems": call.problems, "rows": rows, "heads": heads, "scale": call.scale},
        "threshold": keep_threshold(call.dropout_p) if dropping else DRAWS,
        "kept_scale": keep_scale(call.dropout_p) if dropping else 1.0,
    }
    constants = {
        **{"WIDTH": width, "CHUNK": chunk, "ROWS": tiles.rows, "COLUMNS": tiles.columns},
        "PRECISION": matrix_precision(call.q.dtype),
    }
    programs = slots * -(-width // chunk) * heads * groups
    return Launch(kernel, programs, arguments, constants, tiles.warps, tiles.stages)


def forward_launch(call: AttentionCall, out: Tensor, lse: Tensor) -> Launch:
    launch = _launch(attend_kernel, "attend", call, "rows", {"out": operand(out), "lse": lse})
    return replace(launch, constants=launch.constants | {"POSITIVE": call.scale > _LEAST_FACTOR})


def backward_launches(
    call: AttentionCall,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> list[Launch]:
    """The second reads the delta that the first writes."""
    grad_q, grad_k, grad_v = map(operand, grads)
    shared = {"lse": lse, "grad_out": operand(grad_out), "delta": delta}
    query = {"out": operand(out), "grad_q": grad_q, **shared}
    key = {"grad_k": grad_k, "grad_v": grad_v, **shared}
    return [
        _launch(query_gradient_kernel, "query_gradient", call, "rows", query),
        _launch(key_gradient_kernel, "key_gradient", call, "columns", key),
    ]
