"""Cases of routing at the shapes of routed_mlp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.aot.cases import Built, meta
from flmoe_kernels.core.triton.launches import Launch, record
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.routing import triton as routing
from flmoe_kernels.profile.shapes import RoutedShape, by_name

KERNELS = ("gate", "count", "scan", "limit", "place")
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
    index, mask = (
        meta((sizes.tokens, sizes.choices), torch.int64),
        meta((sizes.tokens,), torch.bool),
    )
    with record() as found:
        routing.gate(meta((sizes.tokens, sizes.experts), dtype), sizes.choices, True)
        routing.limit(index, mask, sizes.experts, CAPACITY)
        routing.dispatch(index, sizes.experts)
    yield from zip((*KERNELS[:4], "count without mask", "scan", "place"), found, strict=True)
