"""Cases of pair_moe: forward, backward and maps, also with eight experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.aot.cases import Built, meta, stated
from flmoe_kernels.core.triton.launches import Launch, record
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.pair_moe import triton
from flmoe_kernels.ops.pair_moe.call import REDUCE_NONE, PairCall
from flmoe_kernels.ops.pair_moe.kinds import kind_codes
from flmoe_kernels.ops.pair_moe.triton.choice import tiles_of
from flmoe_kernels.ops.pair_moe.triton.kernels import (
    accumulate_kernel,
    gradient_kernel,
    project_kernel,
)
from flmoe_kernels.ops.pair_moe.triton.map_kernels import map_kernel
from flmoe_kernels.ops.pair_moe.triton.table import class_of
from flmoe_kernels.profile.shapes import PairShape, by_name

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# The kernels' names in the launch table.
KERNELS = {accumulate_kernel: "accumulate", gradient_kernel: "gradient", map_kernel: "map"}
# Minimum number of matrix instructions of an output's kernel, so that every loop has its products.
LEAST = {"y": 7, "grad_a": 7, "grad_c": 7, "grad_q": 12, "grad_k": 12, "phi": 9, "keys": 9}
BACKWARD = ("project", "grad_a", "grad_c", "grad_q", "grad_k")


@dataclass(frozen=True)
class PairUse:
    """One use of the operator. each: number of experts of each kind; note: added to the variant's name."""

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
        shape = by_name(self.shape, "cuda")
        assert isinstance(shape, PairShape)
        return shape

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
GRADIENTS = ("grad_a", "grad_c", "grad_q", "grad_k")
# (use, outputs, quick). Without masks the two larger shapes differ only in length and share compiled kernels.
USES: tuple[tuple[PairUse, tuple[str, ...], bool], ...] = (
    (BASE, ("y", "project", "grad_q"), True),
    (BASE, ("grad_a", "grad_c", "grad_k"), False),
    (PairUse("pair_base", BFLOAT16, "experts", masks=True), ("y",), False),
    (BASE_POOL, ("keys",), True),
    (BASE_POOL, ("y", "phi", "project", "grad_c", "grad_q", "grad_k"), False),
    (PairUse("pair_512", BFLOAT16, "none"), ("y", "grad_q"), True),
    (PairUse("pair_512", BFLOAT16, "none"), ("project", "grad_a", "grad_c", "grad_k"), False),
    (PairUse("pair_512", BFLOAT16, "pool"), ("y", *BACKWARD), False),
    (MASKED, ("y", *GRADIENTS), False),
    (MASKED_POOL, ("y", "grad_q", "grad_k"), False),
    (MASKED_EXPERTS, ("y",), False),
    (PairUse("pair_long", BFLOAT16, "pool"), ("y", *BACKWARD), False),
    (PairUse("pair_base", BFLOAT16, "none", masks=True, top_k=2), ("y", "grad_q"), False),
    (PairUse("pair_base", FLOAT16, "none", masks=True), ("y", "grad_k"), False),
    (BASE_FLOAT32, ("y", "grad_q"), True),
    (BASE_FLOAT32, ("grad_a", "grad_c", "grad_k"), False),
    (PairUse("pair_base", FLOAT32, "experts", masks=True), ("y",), False),
    (PairUse("pair_base", FLOAT32, "pool", masks=True), ("keys",), False),
    (PairUse("pair_512", FLOAT32, "pool"), ("y", "grad_q"), False),
    (EIGHT, ("y",), True),
    (EIGHT, GRADIENTS, False),
    (PairUse("pair_base", BFLOAT16, "experts", each=2, masks=True), ("y",), False),
    (PairUse("pair_base", BFLOAT16, "pool", each=2, masks=True), ("y", "keys"), False),
    (EIGHT_FLOAT32, ("y", *GRADIENTS), False),
    (PairUse("pair_base", FLOAT32, "experts", each=2, masks=True), ("y",), False),
    (PairUse("pair_base", FLOAT32, "pool", each=2, masks=True), ("keys",), False),
)


def built(use: PairUse, output: str, architecture: Architecture) -> Built:
    call = use.call()
    launch = dict(launches_of(call, use.reduce))[output]
    kernel = KERNELS.get(launch.kernel)
    if kernel is None:
        return Built(launch)
    tiles = tiles_of(kernel, call, architecture)
    row = f"{kernel}, {class_of(call)}, {tiles.rows} x {tiles.columns}"
    return Built(launch, LEAST[output], row, stated(tiles.shared, architecture))


def launches_of(call: PairCall, reduce: str) -> Iterator[tuple[str, Launch]]:
    """Launches of a call as (result, launch); "project" is the launch for side a."""
    with record() as found:
        y, mass = triton.forward(call, reduce)
    yield "y", found[0]
    # Those of q and k also compute those of a and c, where launch.together allows.
    for name, wanted in (("grad_a", "a"), ("grad_c", "c"), ("grad_q", "qab"), ("grad_k", "kc")):
        with record() as found:
            triton.backward(call, reduce, y, mass, [each in wanted for each in "qkacb"])
        if name != "grad_a":  # which does not use the sides
            yield "project", found[0]
        yield name, next(each for each in found if each.kernel is not project_kernel)
    if reduce != REDUCE_NONE:
        head = meta((call.batch, call.experts, call.width), call.q.dtype)
        with record() as phi:
            triton.pair_map(call, head)
        with record() as keys:
            triton.top_pairs(call, head, 1)
        yield from (("phi", phi[-1]), ("keys", keys[-1]))
