"""Cases of routing at the shapes of routed_mlp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.aot.cases import Built, meta
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.routing.triton import launch as routing
from flmoe_kernels.profile.shapes import RoutedShape, by_name

KERNELS = ("gate", "count", "scan", "place", "limit")
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
CAPACITY = 1000


@dataclass(frozen=True)
class RoutingUse:
    shape: str
    dtype: torch.dtype
    variant: str = ""


# (use, kernels, quick).
USES = (
    (RoutingUse("routed_large", BFLOAT16), KERNELS, True),
    (RoutingUse("routed_large", FLOAT16), KERNELS[:1], False),
    (RoutingUse("routed_small_e4", BFLOAT16), KERNELS, False),
    (RoutingUse("routed_small_e16", BFLOAT16), KERNELS, False),
)


def built(use: RoutingUse, kernel: str, _architecture: Architecture) -> Built:
    sizes = by_name(use.shape, "cuda")
    assert isinstance(sizes, RoutedShape)
    return Built(dict(launches_of(sizes, use.dtype))[kernel])


def launches_of(sizes: RoutedShape, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    tokens, choices, experts = sizes.tokens, sizes.choices, sizes.experts
    index = meta((tokens, choices), torch.int64)
    mask = meta((tokens,), torch.bool)
    weight = meta((tokens, choices), dtype)
    blocks = routing.count_blocks(index)
    before, totals, counts, offsets, permutation = (
        meta(shape, torch.int32)
        for shape in (
            (blocks, experts + 1),
            (experts + 1,),
            (experts,),
            (experts + 1,),
            (index.numel(),),
        )
    )
    yield "gate", routing.gate_launch(meta((tokens, experts), dtype), index, weight, True)
    counting = routing.count_launches(index, mask, before, totals)
    yield from zip(("count", "scan"), counting, strict=True)
    yield "place", routing.place_launch(index, before, totals, counts, offsets, permutation)
    yield "limit", routing.limit_launch(index, mask, before, index, experts, CAPACITY)
