"""Launch table of expert_attention: tiles by class of call and architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flmoe_kernels.core.triton.tables import AMD, Table
from flmoe_kernels.core.triton.target import Architecture

# Kernel, class of the call.
Key = tuple[str, str]
# Problems of up to this many rows on average take the smallest tiles.
SHORT = 16
# Maximum number of columns of a width per program.
WIDEST = 128
_UNKNOWN = (0, 0, 0)


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

    shared: maximum bytes per block on sm_80, sm_90 and sm_100 at the named shapes, in the compiled cases,
    with Triton 3.7.1; tests/bench/test_aot.py checks them. widest: maximum number of columns
    of a width per program. branch: whether keys past the last are replaced in a branch, which other tiles skip.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    shared: tuple[int, int, int]
    widest: int = WIDEST
    branch: bool = True


# (kernel, class of the call) -> tiles for every architecture that has none of its own. 64 rows give each of four
# warps the 16 that its matrix instruction takes, and sm_90's the 64 of its group, so that scores stay in the
# registers where they were made; with more warps each row is held twice. 64 columns, because with 128 columns
# "key_gradient" spills on sm_80, sm_90 and sm_100, and "query_gradient" and "attend" spill on sm_100. Two blocks
# share an SM: 255 registers and the shared memory allow it. "wide" is for widths over 64,
# where a tile of rows has twice the bytes: half the columns in "query_gradient"; half the rows in "key_gradient",
# whose sums alone are 128 registers, which leaves its scores to mma.sync on every architecture. "short" is for
# problems of at most 16 rows on average: a warp (two for float32's gradients) and a tile for each problem and
# head, and one kernel for all gradients. float32 products are three TF32 ones, of operands that are split in two:
# 32 x 32 is what does not spill at width 64. "chunked" is for widths over 128, whose rows pass in chunks of 128
# columns; each chunk of the output is a program that makes all scores. Two float32 kernels have chunks of 64,
# twice the programs and at width 256 1.7 times the products: with 128 they spill up to 112 bytes. Tiles of wide
# float32 and of chunked rows are smaller for the registers and the shared memory: nothing spills at widths 128 and
# 256, though up to 584 bytes do at 200, which fills no chunk. Not measured.
_ALL: dict[Key, Tiles] = {
    ("attend", "long"): Tiles(64, 64, 4, 3, (40960, 57344, 57392)),
    ("query_gradient", "long"): Tiles(64, 64, 4, 3, (49152, 65536, 73792)),
    ("key_gradient", "long"): Tiles(64, 64, 4, 3, (58368, 74752, 91216)),
    ("attend", "wide"): Tiles(64, 64, 4, 3, (90112, 114688, 114736)),
    ("query_gradient", "wide"): Tiles(64, 32, 4, 2, (53248, 65536, 73784)),
    ("key_gradient", "wide"): Tiles(32, 64, 4, 2, (53504, 53504, 51464)),
    ("attend", "chunked"): Tiles(64, 32, 4, 1, (45056, 40960, 40968)),
    ("query_gradient", "chunked"): Tiles(32, 32, 4, 1, (43008, 43008, 43008), branch=False),
    ("key_gradient", "chunked"): Tiles(32, 32, 4, 1, (51200, 51200, 51200)),
    ("attend", "short"): Tiles(16, 16, 1, 2, (3072, 3072, 3072)),
    ("gradient", "short"): Tiles(16, 16, 1, 1, (6656, 6656, 6656)),
    ("attend", "float32"): Tiles(32, 32, 4, 1, (24576, 24576, 24576)),
    ("query_gradient", "float32"): Tiles(32, 32, 4, 1, (40960, 40960, 40960)),
    ("key_gradient", "float32"): Tiles(32, 32, 4, 1, (49152, 49152, 49152)),
    ("attend", "float32, wide"): Tiles(16, 32, 4, 1, (32768, 32768, 32768)),
    ("query_gradient", "float32, wide"): Tiles(16, 32, 4, 2, (65536, 65536, 65536)),
    ("key_gradient", "float32, wide"): Tiles(16, 16, 4, 1, (49152, 49152, 49152)),
    ("attend", "float32, chunked"): Tiles(16, 32, 4, 1, (16384, 16384, 16384), 64),
    ("query_gradient", "float32, chunked"): Tiles(32, 16, 4, 1, (40960, 40960, 40960), 64),
    ("key_gradient", "float32, chunked"): Tiles(16, 16, 4, 1, (73728, 73728, 73728)),
    ("attend", "float32, short"): Tiles(16, 16, 1, 1, (6144, 6144, 6144)),
    ("gradient", "float32, short"): Tiles(16, 16, 2, 1, (14336, 14336, 14336)),
}

# Replacements by architecture; their shared bytes elsewhere are 0. With mma.sync, Triton converts the layout of
# scores that are modified in a branch, through shared memory. In the gradient of queries this takes 255 instead of
# 182 registers, and spills on sm_120. On sm_80 and sm_86 the tiles of "long" problems are therefore masked without
# a branch. Wide and chunked rows keep it or not, whichever has no spill. The gradient of keys has tiles with two
# stages (long) or smaller ones (wide and float32, chunked) on sm_86, so that two blocks fit an SM and nothing
# spills on sm_12x. The wide gradient of queries loads a tile ahead where two blocks with three stages fit an SM.
# The other entries exist because the default tiles spill 8 to 24 bytes in one named case: half the columns for
# wide rows on sm_80 and sm_86, three stages for the wide gradient of keys on sm_90, eight warps for chunked rows
# on sm_100, whose float32 gradient of keys also has chunks of 64. AMD has 64 KiB a block. Not measured.
_AMPERE: dict[Key, Tiles] = {
    ("attend", "long"): Tiles(64, 64, 4, 3, (40960, 0, 0), branch=False),
    ("query_gradient", "long"): Tiles(64, 64, 4, 3, (49152, 0, 0), branch=False),
    ("attend", "wide"): Tiles(64, 32, 4, 2, (36864, 0, 0)),
}
_REPLACED: dict[Architecture, dict[Key, Tiles]] = {
    80: _AMPERE,
    86: {
        **_AMPERE,
        ("key_gradient", "long"): Tiles(64, 64, 4, 2, (41472, 0, 0)),
        ("key_gradient", "wide"): Tiles(16, 64, 4, 2, (43136, 0, 0)),
        ("key_gradient", "float32, chunked"): Tiles(16, 32, 4, 1, (40960, 0, 0), 64),
    },
    90: {
        ("query_gradient", "wide"): Tiles(64, 32, 4, 3, (0, 81920, 0)),
        ("key_gradient", "wide"): Tiles(32, 64, 4, 3, (0, 70144, 0)),
    },
    100: {
        ("query_gradient", "wide"): Tiles(64, 32, 4, 3, (0, 0, 90176)),
        ("attend", "chunked"): Tiles(64, 64, 8, 1, (0, 0, 49160)),
        ("key_gradient", "float32, chunked"): Tiles(16, 32, 4, 1, (0, 0, 40960), 64),
    },
    AMD: {("attend", "wide"): Tiles(64, 64, 4, 2, _UNKNOWN)},
}
TABLE: Table[Key, Tiles] = Table(_ALL, _REPLACED)

# Rows, columns, warps and stages that autotune tries for every kernel of a class.
_TRIED = {
    "long": (
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2)),
        *((64, 32, 4, 2), (32, 64, 4, 2), (32, 64, 2, 2), (32, 32, 4, 2)),
    ),
    "wide": (
        *((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2)),
        *((128, 64, 8, 2), (128, 32, 8, 2)),
    ),
    "chunked": ((64, 32, 4, 1), (64, 32, 4, 2), (32, 32, 4, 1), (32, 64, 4, 1), (32, 16, 4, 1)),
    "short": ((16, 16, 1, 1), (16, 16, 1, 2), (16, 32, 1, 1), (32, 16, 1, 1), (32, 32, 2, 1)),
    "float32": ((32, 32, 4, 1), (32, 32, 4, 2), (32, 16, 4, 1), (64, 32, 8, 1), (64, 16, 4, 1)),
    "float32, wide": ((32, 32, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    "float32, chunked": ((32, 32, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    "float32, short": ((16, 16, 1, 1), (16, 16, 2, 1), (16, 32, 1, 1)),
}


def class_of(call: AttentionCall) -> str:
    """The class of a call in TABLE, by dtype, width and mean length; shapes do not show more."""
    width = call.q.shape[3]
    if width > 64:
        size = "wide" if width <= WIDEST else "chunked"
    else:
        size = "short" if call.q.shape[1] <= SHORT * call.problems else "long"
    if call.q.dtype != torch.float32:
        return size
    return "float32" if size == "long" else f"float32, {size}"


def is_short(call: AttentionCall) -> bool:
    """Whether one kernel, "gradient", computes all gradients, with square tiles."""
    return class_of(call).endswith("short")


def candidates(kernel: str, call: AttentionCall, architecture: Architecture | None) -> list[Tiles]:
    """Candidates for autotune; the first is that of the launch table."""
    kind = class_of(call)
    first = TABLE.tiles((kernel, kind), architecture)
    chunks = (64, WIDEST) if kind == "float32, chunked" else (first.widest,)
    tried = [one for one in _TRIED[kind] if kernel != "gradient" or one[0] == one[1]]
    found = (Tiles(*one, _UNKNOWN, widest) for one in tried for widest in chunks)
    return [first, *(one for one in found if replace(first, shared=_UNKNOWN) != one)]
