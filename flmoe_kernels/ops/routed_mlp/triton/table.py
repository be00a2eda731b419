"""Launch table of routed_mlp: tiles by dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_kernels.core.triton.tables import AMD, Table
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.routed_mlp.call import RoutedCall

# Kernel, float32; and LARGE or ODD.
Key = tuple[str | bool, ...]
LARGE, _LARGE = "large", 1024
ODD = "odd"


@dataclass(frozen=True)
class Tiles:
    """Output tile, chunk of the summed dimension, slices of the epilogue, warps, pipeline stages.

    shared: bytes per block on sm_80, sm_90 and sm_100 at routed_small and routed_large, the largest over all;
    compiled with Triton 3.7.1, as tests/bench/test_aot.py checks.
    programs: number of programs per SM.
    """

    rows: int
    columns: int
    deep: int
    slices: int
    warps: int
    stages: int
    shared: tuple[int, int, int]
    programs: int = 2


# (kernel, float32) -> tiles for every architecture that has none of its own. 128 x 128 takes 64 FLOP per byte from
# L2 and what sm_90's matrix units read from shared memory at full rate; 64 deep is one line of 128 bytes. Three
# stages of that are 96 KiB: two blocks fit an SM of sm_90 and sm_100, and one what sm_89 and sm_12x have. Eight
# warps, because four would hold 128 sums a thread, beside which the activations spill; four slices for the same
# reason. The weight gradient has five stages: its rows' places are loaded in the first two. float32 multiplies
# three times, with operands split in registers: a quarter of the tile for four warps. None of them spills
# where widths are even. The fastest tiles have not been measured.
#
# Gated experts use the same entries. Half of a "hidden" tile's columns are from w_in and half from w_gate, so the
# number of accumulators, the operands and FLOP per byte do not change. The epilogue of
# "hidden_gradient" has one more input and output, so it has twice as many slices; with fewer it spills on sm_90.
_ALL: dict[Key, Tiles] = {
    ("hidden", False): Tiles(128, 128, 64, 4, 8, 3, (65536, 98304, 98336)),
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
REGISTERS = {90: 128}
_BY_ROWS = ("hidden", "rows", "hidden_gradient")

# For odd widths, on every architecture: elements are read and stored one by one, and the addresses of 128 x 128
# take up to 248 bytes more than there are registers. A quarter of the tile spills nothing in the named cases; the
# gradient of the hidden layer and float32 need eight warps for it. On sm_100 that gradient has other slices: with
# two the compiler spills 16 bytes to have 128 registers.
_ODD: dict[Key, Tiles] = {
    ("hidden", False, ODD): Tiles(64, 64, 32, 2, 4, 3, (8192, 8192, 16416)),
    ("rows", False, ODD): Tiles(64, 64, 32, 2, 4, 3, (16384, 24576, 24592)),
    ("hidden_gradient", False, ODD): Tiles(64, 64, 32, 2, 8, 3, (12288, 16384, 20496)),
    **{(name, True, ODD): Tiles(64, 64, 32, 2, 8, 3, (32768, 49152, 49160)) for name in _BY_ROWS},
    ("weight_gradient", False, ODD): Tiles(64, 64, 32, 1, 4, 5, (20480, 24576, 28688)),
}


def _wide(slices: int, stages: int, shared: tuple[int, int, int]) -> Tiles:
    return Tiles(128, 256, 64, slices, 8, stages, shared, programs=1)


# Those that an architecture has instead, for calls whose widths both are _LARGE or more; shared bytes elsewhere
# are 0. 128 x 256 does 85 FLOP per byte from L2, 128 x 128 does 64. One program has an SM to itself, with 255
# registers a thread on sm_90: the activations in slices of 32 columns do not spill. Nothing multiplies while it
# finishes a tile, which is why the sums must be long. AMD has 64 KiB a block. Not measured.
_REPLACED: dict[Architecture, dict[Key, Tiles]] = {
    80: _ODD,
    86: _ODD,
    90: {
        **_ODD,
        **{(name, False, LARGE): _wide(8, 3, (0, 147456, 0)) for name in _BY_ROWS},
        ("weight_gradient", False, LARGE): _wide(1, 5, (0, 147968, 0)),
    },
    100: {
        **_ODD,
        ("hidden_gradient", False, ODD): Tiles(64, 64, 32, 4, 8, 3, (0, 0, 20496)),
        ("hidden_gradient", True, ODD): Tiles(64, 64, 32, 1, 8, 3, (0, 0, 49160)),
        **{(name, False, LARGE): _wide(8, 3, (0, 0, 147472)) for name in _BY_ROWS},
        ("hidden", False, LARGE): _wide(8, 3, (0, 0, 147488)),
        ("weight_gradient", False, LARGE): _wide(1, 5, (0, 0, 147984)),
    },
    AMD: {("weight_gradient", False): Tiles(128, 128, 64, 1, 8, 3, (0, 0, 0))},
}
TABLE: Table[Key, Tiles] = Table(_ALL, _REPLACED)

# Rows, columns, depth, slices, warps and stages that autotune tries, by float32.
_TRIED = {
    False: (
        *((128, 128, 64, 4, 8, 3), (128, 128, 64, 4, 4, 3), (128, 256, 64, 8, 8, 3)),
        *((128, 128, 32, 4, 8, 4), (128, 64, 64, 4, 4, 3), (64, 128, 64, 4, 4, 3)),
        *((64, 64, 64, 2, 4, 3), (32, 128, 64, 2, 4, 3)),
    ),
    True: (
        *((64, 64, 32, 2, 4, 3), (64, 64, 32, 2, 4, 2), (64, 128, 32, 2, 8, 3)),
        *((128, 64, 32, 2, 8, 3), (32, 64, 32, 2, 4, 3)),
    ),
}


def key_of(kernel: str, dtype: torch.dtype) -> Key:
    return kernel, dtype == torch.float32


def narrower(kernel: str, call: RoutedCall) -> list[Key]:
    """The key that is tried before key_of: for odd widths, or for widths large enough for larger tiles."""
    key = key_of(kernel, call.x.dtype)
    if call.width % 2 or call.hidden % 2:
        return [(*key, ODD)]
    return [(*key, LARGE)] if min(call.width, call.hidden) >= _LARGE else []


def candidates(kernel: str, call: RoutedCall, architecture: Architecture | None) -> list[Tiles]:
    """Candidates for autotune; the first is that of the launch table."""
    dtype = call.x.dtype
    first = TABLE.tiles(key_of(kernel, dtype), architecture, *narrower(kernel, call))
    fields = ("rows", "columns", "deep", "slices", "warps", "stages")
    own = tuple(getattr(first, name) for name in fields)
    gradient = kernel == "weight_gradient"
    found = [first]
    for rows, columns, deep, slices, warps, stages in _TRIED[dtype == torch.float32]:
        # A weight gradient is stored as a whole, and loads places two stages ahead.
        one = (rows, columns, deep, 1 if gradient else slices, warps, stages + 2 * gradient)
        if one != own:
            found.append(Tiles(*one, (0, 0, 0), 1 if columns > 128 else 2))
    return found
