"""Launch table of pair_moe: tiles by class of call and architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flmoe_kernels.core.triton.tables import Table
from flmoe_kernels.ops.pair_moe.call import REDUCE_EXPERTS, REDUCE_NONE, PairCall

# Kernel, more than _MANY experts, float32; and FEW for calls of few programs.
Key = tuple[str | bool, ...]
_MANY, FEW = 4, "few"
_UNKNOWN = (0, 0, 0)


@dataclass(frozen=True)
class Tiles:
    """Tile of pairs, chunks that widths are read in (deep) and written in (wide), warps, pipeline stages.

    shared: bytes per block on sm_80, sm_90 and sm_100 at the named shapes (R 32, V 64), the largest over all
    reductions and outputs; compiled with Triton 3.7.1, as tests/bench/test_aot.py checks.
    registers: maximum number per thread; 0 leaves it to the compiler, which may spill to use fewer.
    """

    rows: int
    columns: int
    deep: int
    wide: int
    warps: int
    stages: int
    shared: tuple[int, int, int]
    registers: int = 0


# (kernel, more than _MANY experts, float32) -> tiles for every architecture that has none of its own. 16 columns
# are the least that a matrix product sums over, and 64 rows give each of four warps the 16 that its instruction
# takes (and sm_90's the 64 of its group), so that p stays in the registers where it was made. More columns spill
# on sm_80 and sm_90, where a tile per expert and the sums fill the 255 registers of a thread. "map" sums nothing
# over the tile and takes 512 pairs, which leave registers for its keys. Two blocks share an SM, as registers and
# shared memory allow, but for those of eight warps, which are alone and as many warps. Only sm_100 takes more
# than the 99 KiB that the smallest devices of sm_8x and sm_12x have, for the first "gradient".
# float32, whose products split operands in registers, and more than four experts have twice the values or tiles:
# there rows, columns and chunks are what spills nothing in any named case. One still does: the float32 gradient of
# eight experts, up to 104 bytes of a thread, see docs/launch_tables.md. The fastest choice has not been measured.
_ALL: dict[Key, Tiles] = {
    ("accumulate", False, False): Tiles(64, 16, 64, 64, 4, 2, (26624, 36864, 53376)),
    ("gradient", False, False): Tiles(64, 16, 64, 64, 4, 2, (52288, 61504, 107712)),
    ("map", False, False): Tiles(32, 16, 64, 64, 4, 1, (8192, 8192, 8192)),
    ("accumulate", True, False): Tiles(64, 16, 32, 32, 4, 2, (47104, 61440, 94448)),
    ("gradient", True, False): Tiles(16, 16, 16, 32, 4, 1, (1536, 1536, 1536)),
    ("map", True, False): Tiles(16, 32, 32, 64, 8, 1, (3072, 3072, 3072)),
    ("accumulate", False, True): Tiles(16, 16, 32, 64, 4, 2, (38912, 38912, 38912)),
    ("gradient", False, True): Tiles(16, 16, 32, 32, 4, 2, (20480, 20480, 20480)),
    ("map", False, True): Tiles(32, 16, 64, 64, 4, 1, (8192, 8192, 8192)),
    ("accumulate", True, True): Tiles(16, 16, 32, 32, 4, 2, (63488, 63488, 63488)),
    ("gradient", True, True): Tiles(16, 32, 16, 32, 4, 2, (4096, 4096, 4096)),
    ("map", True, True): Tiles(16, 32, 32, 64, 4, 1, (4096, 4096, 4096)),
}

# FEW: calls whose larger side is up to so many blocks of 64 rows, of all samples: fewer than sm_80, sm_90 and
# sm_100 have multiprocessors (sm_86 and sm_89 may have far fewer, and keep the tiles for all). Then the time is
# that of one program, and 16 rows by 64 columns take it through its columns in a quarter of the steps. A limit
# of 255 registers is set where the compiler would spill 8 bytes to fit more blocks, which do not exist.
_ROWS, _FEW_PROGRAMS = 64, 100
_LIMITED = (80, 90, 100)


def _few(accumulate: int, gradient: int) -> dict[Key, Tiles]:
    """Tiles for calls of few programs, with these register limits."""
    return {
        ("accumulate", False, False, FEW): Tiles(16, 64, 64, 64, 4, 2, (47104,) * 3, accumulate),
        ("gradient", False, False, FEW): Tiles(16, 64, 64, 64, 4, 2, (53504,) * 3, gradient),
    }


# Those that an architecture has instead; their shared bytes elsewhere are 0. 32 columns in "accumulate" take 14.6
# instead of 16.8 instructions per pair and expert on sm_90 and 18.2 instead of 21.9 on sm_100, where sums lie in
# tensor memory: twice the pairs share the fixed cost of a step (pointers, masks, barriers). On sm_90 the forward
# that sums experts would spill 8 bytes and keeps the default tile. "gradient" holds
# two tiles of pairs for each expert and spills 24 to 96 bytes with 32 columns. float32 and more than four experts
# have 64 rows on sm_90 and sm_100, for the matrix units of a group of warps, with eight warps and chunks of 16,
# at which nothing spills; sm_100 would spill to stay below 129 registers. float32 "accumulate" of more than four
# experts has sm_80's tile on sm_90 too, with chunks of 16. The fastest choice has not been measured.
_REPLACED: dict[int, dict[Key, Tiles]] = {
    80: _few(0, 0),
    90: {
        **_few(0, 255),
        ("accumulate", False, False): Tiles(64, 32, 64, 64, 4, 2, (0, 57344, 0)),
        ("accumulate", False, False, REDUCE_EXPERTS): _ALL["accumulate", False, False],
        ("accumulate", True, False): Tiles(64, 16, 16, 32, 8, 2, (0, 8192, 0)),
        ("gradient", True, False): Tiles(64, 16, 16, 32, 8, 2, (0, 4608, 0)),
        ("accumulate", False, True): Tiles(64, 16, 16, 64, 8, 2, (0, 16384, 0)),
        ("accumulate", True, True): Tiles(16, 16, 16, 32, 4, 2, (0, 2048, 0)),
    },
    100: {
        **_few(255, 0),
        ("accumulate", False, False): Tiles(64, 32, 64, 64, 4, 2, (0, 0, 73872)),
        ("gradient", True, False): Tiles(64, 16, 16, 32, 8, 2, (0, 0, 5136)),
        ("accumulate", False, True): Tiles(64, 16, 16, 64, 8, 2, (0, 0, 8200), 255),
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


def narrower(kernel: str, call: PairCall, reduce: str = REDUCE_NONE) -> list[Key]:
    """Keys that are tried before key_of: for calls of few programs, and for a forward that sums experts, which
    holds one more tile."""
    key = key_of(kernel, call)
    found = [(*key, FEW)] if few_programs(call) else []
    return [*found, (*key, REDUCE_EXPERTS)] if reduce == REDUCE_EXPERTS else found


def registers_of(tiles: Tiles) -> dict[int, int]:
    """Maximum number of registers per thread by architecture, see Launch."""
    return dict.fromkeys(_LIMITED, tiles.registers) if tiles.registers else {}


def class_of(call: PairCall) -> str:
    """Description of a call's class, used in the keys of autotune."""
    experts = f"more than {_MANY} experts" if call.experts > _MANY else f"up to {_MANY} experts"
    return f"{experts}, {'float32' if call.q.dtype == torch.float32 else '16 bit'}"


def candidates(
    kernel: str, call: PairCall, architecture: int | None, reduce: str = REDUCE_NONE
) -> list[Tiles]:
    """Candidates for autotune; the first is that of the launch table. All use the table's chunks."""
    first = TABLE.tiles(key_of(kernel, call), architecture, *narrower(kernel, call, reduce))
    fields = ("rows", "columns", "warps", "stages")
    own = tuple(getattr(first, name) for name in fields)
    tried = (one for one in _TRIED[kernel] if one != own)
    return [
        first,
        *(replace(first, **dict(zip(fields, one, strict=True)), shared=_UNKNOWN) for one in tried),
    ]
