"""Launches of pair_moe: forward, backward and maps at its named shapes, and other numbers of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.aot import costs
from bench.aot.architectures import Architecture
from bench.aot.cases import ALL, NONE, ONE, Built, Case, dtype_name, meta, stated
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.ops.pair_moe.call import REDUCE_NONE, REDUCE_POOL, PairCall
from flmoe_kernels.ops.pair_moe.kinds import kind_codes
from flmoe_kernels.ops.pair_moe.triton import launch as launches
from flmoe_kernels.ops.pair_moe.triton.table import class_of
from flmoe_kernels.profile.shapes import PairShape, by_name

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# What each output is computed by: the kernel's row of the launch table.
KERNELS = {"y": "accumulate", "grad_a": "accumulate", "grad_c": "accumulate"}
KERNELS |= {"grad_q": "gradient", "grad_k": "gradient", "phi": "map", "keys": "map"}
# Matrix instructions that a kernel has at least: no loop is left without its products.
LEAST = {"accumulate": 7, "gradient": 12, "map": 9}
_COSTS: dict[str, Callable[..., costs.Work]] = {
    "accumulate": costs.pair_accumulate,
    "gradient": costs.pair_gradient,
    "map": costs.pair_map,
}
BACKWARD = ("project", "grad_a", "grad_c", "grad_q", "grad_k")
MAPS = ("phi", "keys")


@dataclass(frozen=True)
class PairUse:
    """A use of the operator; each: experts of every kind of the shape; note: what its name says besides."""

    shape: str
    dtype: torch.dtype
    reduce: str
    each: int = 1
    masks: bool = False
    top_k: int | None = None
    note: str = ""

    @property
    def variant(self) -> str:
        words = [self.reduce]
        words += [f"{self.each * len(self.sizes.kinds)} experts"] if self.each > 1 else []
        words += [f"top {self.top_k}"] if self.top_k else []
        words += [self.note] if self.note else []
        return ", ".join(words)

    @property
    def sizes(self) -> PairShape:
        found = by_name(self.shape, "cuda")
        assert isinstance(found, PairShape)
        return found

    def call(self) -> PairCall:
        sizes = self.sizes
        kinds = sizes.kinds * self.each
        batch, experts, rows, columns = sizes.batch, len(kinds), sizes.rows, sizes.columns
        return PairCall(
            meta((batch, experts, rows, sizes.rank), self.dtype),
            meta((batch, experts, columns, sizes.rank), self.dtype),
            meta((batch, experts, rows, sizes.width), self.dtype),
            meta((batch, experts, columns, sizes.width), self.dtype),
            meta((experts,), self.dtype),
            meta((batch, rows), torch.bool) if self.masks else None,
            meta((batch, columns), torch.bool) if self.masks else None,
            tuple(kind_codes(kinds)),
            self.top_k or experts,
            sizes.rank**-0.5,
        )


BASE, BASE_POOL = (PairUse("pair_base", BFLOAT16, r, masks=True) for r in ("none", "pool"))
BASE_FLOAT32 = PairUse("pair_base", FLOAT32, "none", masks=True)
MASKED, MASKED_POOL, MASKED_EXPERTS = (
    PairUse("pair_512", BFLOAT16, reduce, masks=True, note="masked")
    for reduce in ("none", "pool", "experts")
)
EIGHT = PairUse("pair_base", BFLOAT16, "none", each=2, masks=True)
EIGHT_FLOAT32 = PairUse("pair_base", FLOAT32, "none", each=2, masks=True)
# (use, outputs, architectures of the quick set). Without masks lengths are all that differs between the two larger
# shapes, and one compilation serves both.
USES: tuple[tuple[PairUse, tuple[str, ...], tuple[int, ...]], ...] = (
    (BASE, ("y", *BACKWARD), ALL),
    (PairUse("pair_base", BFLOAT16, "experts", masks=True), ("y",), ALL),
    (BASE_POOL, ("y", *MAPS), ALL),
    (BASE_POOL, ("project", "grad_c", "grad_q", "grad_k"), ONE),
    (PairUse("pair_512", BFLOAT16, "none"), ("y", *BACKWARD), NONE),
    (PairUse("pair_512", BFLOAT16, "pool"), ("y", "grad_q"), ALL),
    (PairUse("pair_512", BFLOAT16, "pool"), ("project", "grad_a", "grad_c", "grad_k"), NONE),
    (MASKED, ("y", "grad_a", "grad_c", "grad_q", "grad_k"), NONE),
    (MASKED_POOL, ("y", "grad_q", "grad_k"), NONE),
    (MASKED_EXPERTS, ("y",), NONE),
    (PairUse("pair_long", BFLOAT16, "pool"), ("y", "grad_q"), ALL),
    (PairUse("pair_long", BFLOAT16, "pool"), ("project", "grad_a", "grad_c", "grad_k"), NONE),
    (PairUse("pair_base", BFLOAT16, "none", masks=True, top_k=2), ("y", "grad_q"), ONE),
    (PairUse("pair_base", FLOAT16, "none", masks=True), ("y", "grad_k"), ONE),
    (BASE_FLOAT32, ("y", "grad_q"), ALL),
    (BASE_FLOAT32, ("grad_a", "grad_c", "grad_k"), NONE),
    (PairUse("pair_base", FLOAT32, "experts", masks=True), ("y",), NONE),
    (PairUse("pair_base", FLOAT32, "pool", masks=True), ("keys",), ONE),
    (PairUse("pair_512", FLOAT32, "pool"), ("y", "grad_q"), NONE),
    (EIGHT, ("y", "grad_q"), ONE),
    (EIGHT, ("grad_a", "grad_c", "grad_k"), NONE),
    (PairUse("pair_base", BFLOAT16, "experts", each=2, masks=True), ("y",), NONE),
    (PairUse("pair_base", BFLOAT16, "pool", each=2, masks=True), ("y", "keys"), NONE),
    (EIGHT_FLOAT32, ("y", "grad_a", "grad_c", "grad_q", "grad_k"), NONE),
    (PairUse("pair_base", FLOAT32, "experts", each=2, masks=True), ("y",), NONE),
    (PairUse("pair_base", FLOAT32, "pool", each=2, masks=True), ("keys",), NONE),
)


def cases() -> Iterator[Case]:
    for use, outputs, quick in USES:
        for output in outputs:
            kind = dtype_name(use.dtype)
            build = partial(built, use, output)
            yield Case("pair_moe", output, use.shape, kind, use.variant, build, quick)


def built(use: PairUse, output: str, device: Architecture) -> Built:
    call = use.call()
    launch = dict(launches_of(call, use.reduce, device.number))[output]
    kernel = KERNELS.get(output)
    if kernel is None:
        return Built(launch, costs.work(launch, use.dtype))
    reduce = use.reduce if output == "y" else REDUCE_NONE
    tiles = launches.tiles_of(kernel, call, device.number, reduce)
    row = f"{kernel}, {class_of(call)}, {tiles.rows} x {tiles.columns}"
    table = stated(tiles.shared, device)
    return Built(launch, _COSTS[kernel](launch, use.dtype), LEAST[kernel], row, table)


def launches_of(call: PairCall, reduce: str, architecture: int) -> Iterator[tuple[str, Launch]]:
    """Every launch of a call by what it computes; "project" is side a's."""
    statistics = call.statistics
    y = meta(call.y_shape(reduce), call.y_dtype(reduce))
    out = y
    if reduce == REDUCE_POOL:
        blocks = launches.row_blocks("accumulate", call, architecture)
        out = meta((call.batch, call.experts, blocks, call.width), statistics)
    mass = meta(tuple(call.q.shape[:3]), statistics)
    yield "y", launches.forward_launch(call, reduce, out, mass, architecture=architecture)
    sides = launches.make_sides(call, reduce, call.q.dtype)
    yield "project", launches.project_launches(call, reduce, y, mass, sides)[0]
    q, k, a, c = (meta(tuple(x.shape), call.q.dtype) for x in (call.q, call.k, call.a, call.c))
    blocks = launches.row_blocks("gradient", call, architecture)
    bias = meta((call.batch, blocks, call.experts), statistics)
    found = launches.backward_launches(
        call, reduce, y, sides, (q, k, a, c), bias, architecture=architecture
    )
    yield from zip(("grad_a", "grad_c", "grad_q", "grad_k"), found, strict=True)
    if reduce != REDUCE_NONE:
        sides = launches.make_sides(call, REDUCE_POOL, statistics)
        shape = (call.batch, call.experts, call.rows, call.columns)
        phi = meta(shape, statistics)
        yield "phi", launches.map_launch(call, sides, phi, 0, call.rows, architecture=architecture)
        keys = meta((call.batch, call.experts + 1, *shape[2:]), torch.int64)
        yield (
            "keys",
            launches.map_launch(call, sides, keys, 0, call.rows, architecture=architecture),
        )
