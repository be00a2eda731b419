"""Compiles every kernel of pair_moe ahead of time and prints one JSON report a line; run by test_triton_static.

A process of its own: the compiler is native code, and a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from flmoe_kernels.pair_moe.call import REDUCE_NONE, REDUCE_POOL, PairCall
from flmoe_kernels.pair_moe.kinds import DEFAULT_KINDS, kind_codes
from flmoe_kernels.pair_moe.triton import launch as launches
from flmoe_kernels.triton_runtime import Launch

ARCHITECTURES = (80, 90, 100)
KERNELS = {"y": "accumulate", "grad_a": "accumulate", "grad_c": "accumulate"}
KERNELS |= {"grad_q": "gradient", "grad_k": "gradient", "phi": "map", "keys": "map"}


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """A shape of SPEC.md, its specialisations, and outputs to compile; one expert of each kind, or two."""

    name: str
    sizes: tuple[int, int, int]
    dtype: torch.dtype
    reduce: str
    outputs: tuple[str, ...]
    each: int = 1
    masks: bool = True
    top_k: int | None = None

    def call(self) -> PairCall:
        batch, rows, columns = self.sizes
        kinds = DEFAULT_KINDS * self.each
        experts, rank, width = len(kinds), 32, 64
        return PairCall(
            meta((batch, experts, rows, rank), self.dtype),
            meta((batch, experts, columns, rank), self.dtype),
            meta((batch, experts, rows, width), self.dtype),
            meta((batch, experts, columns, width), self.dtype),
            meta((experts,), self.dtype),
            meta((batch, rows), torch.bool) if self.masks else None,
            meta((batch, columns), torch.bool) if self.masks else None,
            tuple(kind_codes(kinds)),
            self.top_k or experts,
            rank**-0.5,
        )


PAIR_BASE, PAIR_LONG = (8, 320, 196), (1, 8192, 8192)
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# What "none" and "pool" share is compiled once.
NONE = ("y", "grad_a", "grad_c", "grad_q", "grad_k", "project")
POOL = ("y", "grad_c", "grad_q", "grad_k", "project", "phi", "keys")
CASES = (
    StaticCase("bfloat16", PAIR_BASE, BFLOAT16, "none", NONE),
    StaticCase("bfloat16", PAIR_BASE, BFLOAT16, "experts", ("y",)),
    StaticCase("bfloat16", PAIR_BASE, BFLOAT16, "pool", POOL),
    StaticCase("bfloat16, long", PAIR_LONG, BFLOAT16, "pool", ("y", "grad_q"), masks=False),
    StaticCase("bfloat16, top 2", PAIR_BASE, BFLOAT16, "none", ("y", "grad_q"), top_k=2),
    StaticCase("float16", PAIR_BASE, FLOAT16, "none", ("y", "grad_k")),
    StaticCase("float32", PAIR_BASE, FLOAT32, "none", ("y", "grad_q")),
    StaticCase("float32", PAIR_BASE, FLOAT32, "pool", ("keys",)),
    StaticCase("8 experts", PAIR_BASE, BFLOAT16, "none", ("y", "grad_q"), each=2),
    StaticCase("8 experts", PAIR_BASE, BFLOAT16, "pool", ("keys",), each=2),
    StaticCase("8 experts, float32", PAIR_BASE, FLOAT32, "none", ("y", "grad_q"), each=2),
)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(case: StaticCase) -> Iterator[tuple[str, Launch]]:
    """Every launch of a call by what it computes."""
    call, reduce = case.call(), case.reduce
    statistics = torch.float32
    y = meta(call.y_shape(reduce), call.y_dtype(reduce))
    out = y
    if reduce == REDUCE_POOL:
        blocks = launches.row_blocks("accumulate", call)
        out = meta((call.batch, call.experts, blocks, call.width), statistics)
    mass = meta(tuple(call.q.shape[:3]), statistics)
    yield "y", launches.forward_launch(call, reduce, out, mass)
    sides = launches.make_sides(call, reduce, case.dtype)
    yield "project", launches.project_launches(call, reduce, y, mass, sides)[0]
    grads = tuple(meta(tuple(x.shape), case.dtype) for x in (call.q, call.k, call.a, call.c))
    bias = meta((call.batch, launches.row_blocks("gradient", call), call.experts), statistics)
    found = launches.backward_launches(call, reduce, y, sides, grads, bias)
    yield from zip(("grad_a", "grad_c", "grad_q", "grad_k"), found, strict=True)
    if reduce != REDUCE_NONE:
        sides = launches.make_sides(call, REDUCE_POOL, statistics)
        shape = (call.batch, call.experts, call.rows, call.columns)
        phi, keys = meta(shape, statistics), meta(shape, torch.int64)
        yield "phi", launches.map_launch(call, sides, phi, 0, call.rows)
        yield "keys", launches.map_launch(call, sides, keys, 0, call.rows)


def main() -> None:
    for case in CASES:
        call = case.call()
        for output, launch in launches_of(case):
            if output not in case.outputs:
                continue
            kernel = KERNELS.get(output)
            expected = launches.tiles_of(kernel, call).shared if kernel else (None,) * 3
            for architecture, shared in zip(ARCHITECTURES, expected, strict=True):
                report = dataclasses.asdict(launch.compile(architecture))
                facts = {"case": case.name, "reduce": case.reduce, "output": output}
                facts |= {"kernel": kernel, "architecture": architecture, "expected": shared}
                print(json.dumps(facts | report), flush=True)


if __name__ == "__main__":
    main()
