"""Launches of expert_attention: the layer's three shapes, one long problem, and the widest head of each class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.aot import costs
from bench.aot.architectures import Architecture
from bench.aot.cases import ALL, NONE, ONE, Built, Case, dtype_name, meta, stated
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.ops.expert_attention.triton import launch as launches
from flmoe_kernels.ops.expert_attention.triton.table import AttentionCall, class_of
from flmoe_kernels.profile.shapes import LayerShape, by_name

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = ("attend", "query_gradient", "key_gradient")
# How many products a kernel has, each with at least four instructions.
PRODUCTS = {"attend": 2, "query_gradient": 3, "key_gradient": 4}


@dataclass(frozen=True)
class AttentionUse:
    """Packed q, k, v (groups, rows, 3, heads, width); in each group runs of rows, the rest are padding."""

    shape: str
    dtype: torch.dtype
    groups: int
    rows: int
    runs: tuple[int, ...]
    heads: int
    width: int
    dropout_p: float = 0.5
    variant: str = ""

    @property
    def scores(self) -> int:
        return self.groups * self.heads * sum(length**2 for length in self.runs)

    def call(self) -> AttentionCall:
        q, k, v = self.packed()
        seed = meta((), torch.int64) if self.dropout_p else None
        runs = meta((len(self.runs) + 1,), torch.int32)
        return AttentionCall(q, k, v, runs, seed, self.dropout_p, self.width**-0.5)

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (self.groups, self.rows, 3, self.heads, self.width)
        q, k, v = meta(shape, self.dtype).unbind(2)
        return q, k, v


def of_layer(
    name: str, dtype: torch.dtype, heads: int | None = None, variant: str = "", **rest: float
) -> AttentionUse:
    """A training step of the layer: a group for each expert and view, as a GPU packs rows, padding last."""
    shape = by_name(name, "cuda")
    assert isinstance(shape, LayerShape)
    rows, heads = shape.batch * sum(shape.tokens), heads or shape.heads
    return AttentionUse(
        name,
        dtype,
        shape.fusion_models * shape.views,
        rows,
        (shape.valid_tokens,) * shape.batch,
        heads,
        shape.dim // heads,
        rest.get("dropout_p", shape.dropout),
        variant,
    )


# Of one head its number is a constant to the compiler.
WIDE = AttentionUse("mmimdb", BFLOAT16, 12, 32 * 516, (356,) * 32, 2, 256, 0.5, "width 256")
LONG = AttentionUse("long", BFLOAT16, 1, 8192, (8192,), 4, 64, 0.0)
# (use, kernels, architectures of the quick set). mmimdb and enrico run the same compiled kernels.
USES: tuple[tuple[AttentionUse, tuple[str, ...], tuple[int, ...]], ...] = (
    (of_layer("mmimdb", BFLOAT16), KERNELS, ALL),
    (of_layer("enrico", BFLOAT16), KERNELS, ALL),
    (of_layer("mimic", BFLOAT16), KERNELS, ALL),
    (of_layer("mmimdb", FLOAT16, variant="inference", dropout_p=0.0), KERNELS[:1], ONE),
    (of_layer("mmimdb", FLOAT16, variant="no dropout", dropout_p=0.0), KERNELS[2:], (80,)),
    (LONG, KERNELS, ONE),
    (of_layer("mmimdb", BFLOAT16, 2, "heads 2"), KERNELS, (90, 100)),
    (of_layer("mmimdb", BFLOAT16, 1, "heads 1"), KERNELS, ONE),
    (of_layer("mmimdb", FLOAT32), KERNELS, ONE),
    (of_layer("mimic", FLOAT32), KERNELS, ONE),
    (of_layer("mmimdb", FLOAT32, 2, "heads 2"), KERNELS, NONE),
    (of_layer("mmimdb", FLOAT32, 1, "heads 1"), KERNELS, NONE),
    (of_layer("mmimdb", FLOAT16, 2, "heads 2, no dropout", dropout_p=0.0), KERNELS, NONE),
    (of_layer("mmimdb", FLOAT32, 2, "heads 2, no dropout", dropout_p=0.0), KERNELS, NONE),
    (WIDE, KERNELS, NONE),
)


def cases() -> Iterator[Case]:
    for use, kernels, quick in USES:
        for kernel in kernels:
            build = partial(built, use, kernel)
            kind = dtype_name(use.dtype)
            yield Case("expert_attention", kernel, use.shape, kind, use.variant, build, quick)


def built(use: AttentionUse, kernel: str, device: Architecture) -> Built:
    call = launches.readable(use.call())
    launch = dict(launches_of(use, call, device.number))[kernel]
    valid = sum(use.runs) / use.rows
    tiles = launches.tiles_of(kernel, call, device.number)
    return Built(
        launch,
        costs.attention(kernel, launch, use.dtype, use.scores, valid),
        4 * PRODUCTS[kernel],
        f"{kernel}, {class_of(call)}, {tiles.rows} x {tiles.columns}",
        stated(tiles.shared, device),
    )


def launches_of(
    use: AttentionUse, call: AttentionCall, architecture: int
) -> Iterator[tuple[str, Launch]]:
    """Every launch of a call by its kernel."""
    out = meta(tuple(call.q.shape), use.dtype)
    lse = meta(tuple(call.q.shape[:3]), torch.float32)
    yield KERNELS[0], launches.forward_launch(call, out, lse, architecture=architecture)
    found = launches.backward_launches(
        call, out, out, lse, lse, use.packed(), architecture=architecture
    )
    yield from zip(KERNELS[1:], found, strict=True)
