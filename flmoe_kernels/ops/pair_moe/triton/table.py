"""Launch table of pair_moe: tiles by class of call and architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flmoe_kernels.core.triton.tables import Table
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.pair_moe.call import PairCall

# Kernel, more than _MANY experts, float32; and FEW for calls of few programs.
Key = tuple[str | bool, ...]
_MANY, FEW = 4, "few"
_UNKNOWN = (0, 0, 0)


@dataclass(frozen=True)
class Tiles:
    """Tile of pairs, chunks that widths are read in (deep) and written in (wide), warps, pipeline stages.

    shared: bytes per block on sm_80, sm_90 and sm_100 at the named shapes (R 32, V 64), the largest over all
    reductions and outputs; compiled with Triton 3.7.1, as tests/bench/test_aot.py checks.
    sums: columns of sums of all experts up to which "gradient" also computes the gradient of a or c, see
    launch.together. lanes: partial sums of a row; 0 stands for those of mma.sync and wgmma, see launch.lanes_of.
    held: whether a program's own tiles of tokens are loaded before its loop.
    """

    rows: int
    columns: int
    deep: int
    wide: int
    warps: int
    stages: int
    shared: tuple[int, int, int]
    sums: int = 0
    lanes: int = 0
    held: bool = False


# (kernel, more than _MANY experts, float32) -> tiles for every architecture that has none of its own. 16 columns
# are the least that a matrix product sums over, and 64 rows give each of four warps the 16 that its instruction
# takes (and sm_90's the 64 of its group), so that p stays in the registers where it was made. More columns spill
# on sm_80, where a tile per expert and the sums fill the 255 registers of a thread. "map" sums nothing over the
# tile and takes 512 pairs, which leave registers for its keys. float32, whose products split operands in
# registers, and more than four experts have twice the values or tiles. Their rows, columns and chunks were chosen
# so that no named case spills, with one exception: the float32 gradient of k of eight experts on sm_100, see
# docs/launch_tables.md. Not measured.
_ALL: dict[Key, Tiles] = {
    ("accumulate", False, False): Tiles(64, 16, 64, 64, 4, 3, (36864, 0, 0)),
    ("gradient", False, False): Tiles(64, 16, 64, 64, 4, 2, (51264, 0, 0), 192),
    ("map", False, False): Tiles(32, 16, 64, 64, 4, 1, (8192, 8192, 8192)),
    ("accumulate", True, False): Tiles(64, 16, 32, 32, 4, 2, (47104, 0, 0)),
    ("gradient", True, False): Tiles(16, 16, 16, 64, 4, 1, (2560, 0, 0), 640),
    ("map", True, False): Tiles(16, 32, 32, 64, 8, 1, (3072, 3072, 3072)),
    ("accumulate", False, True): Tiles(16, 16, 32, 64, 4, 2, (38912, 0, 0)),
    ("gradient", False, True): Tiles(16, 16, 32, 64, 4, 2, (38912, 38912, 38912), 320),
    ("map", False, True): Tiles(32, 16, 64, 64, 4, 1, (8192, 8192, 8192)),
    ("accumulate", True, True): Tiles(16, 16, 32, 32, 4, 2, (63488, 0, 63488)),
    ("gradient", True, True): Tiles(16, 32, 16, 32, 4, 1, (4096, 4096, 4096), lanes=1),
    ("map", True, True): Tiles(16, 32, 32, 64, 4, 1, (4096, 4096, 4096)),
}

# FEW: calls whose larger side is up to so many blocks of 64 rows, of all samples: fewer than sm_80, sm_90 and
# sm_100 have multiprocessors (sm_86 and sm_89 may have far fewer, and keep the tiles for all). Then the time is
# that of one program, and 16 rows by 64 columns take it through its columns in a quarter of the steps.
_ROWS, _FEW_PROGRAMS = 64, 100
_SUMS, _GRADIENT = ("accumulate", False, False, FEW), ("gradient", False, False, FEW)


# Those that an architecture has instead; their shared bytes elsewhere are 0. 32 columns in "accumulate" take 10.3
# instead of 12.1 instructions per pair and expert on sm_90 and 13.6 instead of 17.6 on sm_100, where sums lie in
# tensor memory: twice the pairs share the fixed cost of a step (pointers, masks, barriers). "gradient" holds two
# tiles of pairs for each expert and spills with 32 columns; with 16, sm_90 and sm_100 have room for the sums of a
# and c in every reduction, sm_80 for one product's. A thread of sm_100 has a row of a tile for itself. float32 and
# more than four experts have 64 rows on sm_90 and sm_100, for the matrix units of a group of warps, with eight
# warps and chunks of 16, at which nothing spills. float32 "accumulate" of more than four experts has sm_80's tile
# on sm_90 too, with chunks of 16. The fastest choice has not been measured.
# Without `held`, Triton 3.9 copies these tiles to shared memory in every step of "gradient" and spills 240 bytes;
# Triton 3.7 copies them once. With mma.sync, `held` spills more.
_REPLACED: dict[Architecture, dict[Key, Tiles]] = {
    80: {
        _SUMS: Tiles(16, 64, 64, 64, 4, 2, (47104, 0, 0)),
        _GRADIENT: Tiles(16, 64, 64, 64, 4, 2, (53504, 0, 0), 320),
    },
    90: {
        _SUMS: Tiles(16, 64, 64, 64, 4, 2, (0, 47104, 0)),
        _GRADIENT: Tiles(16, 64, 64, 64, 4, 3, (0, 94720, 0), 320),
        ("accumulate", False, False): Tiles(64, 32, 64, 64, 4, 3, (0, 77824, 0), held=True),
        ("gradient", False, False): Tiles(64, 16, 64, 64, 4, 3, (0, 71808, 0), 320, held=True),
        ("accumulate", True, False): Tiles(64, 16, 16, 32, 8, 2, (0, 4608, 0)),
        ("gradient", True, False): Tiles(64, 16, 16, 64, 8, 2, (0, 8192, 0), 384),
        ("accumulate", False, True): Tiles(64, 16, 16, 64, 8, 2, (0, 16384, 0)),
        ("accumulate", True, True): Tiles(16, 16, 16, 32, 4, 1, (0, 2048, 0), lanes=1),
    },
    100: {
        _SUMS: Tiles(16, 64, 64, 64, 4, 2, (0, 0, 47104)),
        _GRADIENT: Tiles(16, 64, 64, 64, 4, 2, (0, 0, 53504)),
        ("accumulate", False, False): Tiles(64, 32, 64, 64, 4, 2, (0, 0, 73840), lanes=1),
        ("gradient", False, False): Tiles(64, 16, 64, 64, 4, 2, (0, 0, 113120), 320),
        ("accumulate", True, False): Tiles(64, 16, 32, 32, 4, 2, (0, 0, 94432), lanes=1),
        ("gradient", True, False): Tiles(64, 16, 16, 64, 8, 2, (0, 0, 8192), 640),
        ("accumulate", False, True): Tiles(64, 16, 16, 64, 8, 2, (0, 0, 8200)),
    },
}
TABLE: Table[Key, Tiles] = Table(_ALL, _REPLACED)

# Rows, columns, warps and stages that autotune tries: tiles of 256 to 4096 pairs.
_TRIED = {
    "accumulate": (
        *((64, 16, 4, 2), (64, 32, 4, 2), (128, 16, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        *((16, 16, 4, 2), (32, 16, 2, 2), (32, 32, 4, 2), (16, 32, 2, 2), (16, 64, 4, 2)),
    ),
    "gradient": (
        *((16, 16, 4, 2), (64, 16, 4, 2), (64, 32, 4, 2), (128, 16, 8, 2), (64, 16, 8, 2)),
        *((32, 16, 2, 2), (32, 16, 4, 2), (16, 32, 2, 2), (16, 64, 4, 2)),
    ),
    "map": ((32, 16, 4, 1), (64, 16, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1), (16, 64, 4, 1)),
}


def key_of(kernel: str, call: PairCall) -> Key:
    return kernel, call.experts > _MANY, call.q.dtype == torch.float32


def few_programs(call: PairCall) -> bool:
    """Whether a call's programs would leave most of a GPU idle, by shapes alone."""
    return call.batch * -(-max(call.rows, call.columns) // _ROWS) <= _FEW_PROGRAMS


def narrower(kernel: str, call: PairCall) -> list[Key]:
    """Keys that are tried before key_of, for calls of few programs."""
    return [(*key_of(kernel, call), FEW)] if few_programs(call) else []


def class_of(call: PairCall) -> str:
    """Description of a call's class, used in the keys of autotune."""
    experts = f"more than {_MANY} experts" if call.experts > _MANY else f"up to {_MANY} experts"
    return f"{experts}, {'float32' if call.q.dtype == torch.float32 else '16 bit'}"


def candidates(kernel: str, call: PairCall, architecture: Architecture | None) -> list[Tiles]:
    """Candidates for autotune; the first is that of the launch table. All use the table's chunks."""
    first = TABLE.tiles(key_of(kernel, call), architecture, *narrower(kernel, call))
    plain = replace(first, shared=_UNKNOWN)
    tried = [
        replace(plain, rows=rows, columns=columns, warps=warps, stages=stages)
        for rows, columns, warps, stages in _TRIED[kernel]
    ]
    tried = [tiles if tiles.rows >= 64 else replace(tiles, held=False) for tiles in tried]
    return [first, *(tiles for tiles in tried if tiles != plain)]
