"""Cases of expert_attention: the layer's shapes, a long sequence and wide heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.aot.cases import Built, meta, stated
from flmoe_kernels.core.triton.launches import Launch, record
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.expert_attention import triton as attention
from flmoe_kernels.ops.expert_attention.triton.choice import tiles_of
from flmoe_kernels.ops.expert_attention.triton.table import AttentionCall, class_of, is_short
from flmoe_kernels.profile.shapes import LayerShape, by_name

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = ("attend", "query_gradient", "key_gradient")
SHORT = ("attend", "gradient")
# Number of matrix products in each kernel; each product has at least four instructions.
# Number of products over the width of a head, and over the rows or columns of a tile.
PRODUCTS = {"attend": (1, 1), "query_gradient": (2, 1), "key_gradient": (2, 2)}
PRODUCTS["gradient"] = (4, 4)


@dataclass(frozen=True)
class AttentionUse:
    """Packed q, k, v (groups, rows, 3, heads, width). runs: lengths of a group's runs; other rows are padding."""

    shape: str
    dtype: torch.dtype
    groups: int
    rows: int
    runs: tuple[int, ...]
    heads: int
    width: int
    dropout_p: float = 0.5
    variant: str = ""

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
    """A training step of the layer: one group per expert and view, rows packed as on a GPU, padding last."""
    shape = by_name(name, "cuda")
    assert isinstance(shape, LayerShape)
    rows, heads = shape.batch * sum(shape.padded_tokens), heads or shape.heads
    return AttentionUse(
        name,
        dtype,
        shape.fusion_models * shape.views,
        rows,
        shape.valid_tokens,
        heads,
        shape.dim // heads,
        rest.get("dropout_p", shape.dropout),
        variant,
    )


# With one head the number of heads is a compile-time constant.
WIDE = AttentionUse("mmimdb", BFLOAT16, 12, 32 * 516, (356,) * 32, 2, 256, 0.5, "width 256")
LONG = AttentionUse("long", BFLOAT16, 1, 8192, (8192,), 4, 64, 0.0)
# (use, kernels, quick). mmimdb, enrico and mmhs150k run the same compiled kernels, mimic and tokens_24 others.
USES: tuple[tuple[AttentionUse, tuple[str, ...], bool], ...] = (
    (of_layer("mmimdb", BFLOAT16), KERNELS, True),
    (of_layer("enrico", BFLOAT16), KERNELS, False),
    (of_layer("mimic", BFLOAT16), SHORT, True),
    (of_layer("decor_mimic", BFLOAT16), KERNELS, False),
    (of_layer("mmimdb", FLOAT16, variant="inference", dropout_p=0.0), KERNELS[:1], False),
    (of_layer("mmimdb", FLOAT16, variant="no dropout", dropout_p=0.0), KERNELS[2:], False),
    (LONG, KERNELS, False),
    (of_layer("mmimdb", BFLOAT16, 2, "heads 2"), KERNELS, True),
    (of_layer("mmimdb", BFLOAT16, 1, "heads 1"), KERNELS[:1], True),
    (of_layer("mmimdb", BFLOAT16, 1, "heads 1"), KERNELS[1:], False),
    (of_layer("mmimdb", FLOAT32), KERNELS[:1], True),
    (of_layer("mmimdb", FLOAT32), KERNELS[1:], False),
    (of_layer("mimic", FLOAT32), SHORT, False),
    (of_layer("mmimdb", FLOAT32, 2, "heads 2"), KERNELS, False),
    (of_layer("mmimdb", FLOAT32, 1, "heads 1"), KERNELS, False),
    (of_layer("mmimdb", FLOAT16, 2, "heads 2, no dropout", dropout_p=0.0), KERNELS, False),
    (of_layer("mmimdb", FLOAT32, 2, "heads 2, no dropout", dropout_p=0.0), KERNELS, False),
    (WIDE, KERNELS, False),
)


def kernels_of(call: AttentionCall) -> tuple[str, ...]:
    return SHORT if is_short(call) else KERNELS


def built(use: AttentionUse, kernel: str, architecture: Architecture) -> Built:
    call = use.call()
    tiles = tiles_of(kernel, call, architecture)
    over_width, over_tile = PRODUCTS[kernel]
    return Built(
        dict(launches_of(use))[kernel],
        over_width * min(4, use.width // 16) + 4 * over_tile,
        f"{kernel}, {class_of(call)}, {tiles.rows} x {tiles.columns}",
        stated(tiles.shared, architecture),
    )


def launches_of(use: AttentionUse) -> Iterator[tuple[str, Launch]]:
    call = use.call()
    rest = (call.cu_seqlens, call.seed, call.dropout_p, call.scale)
    with record() as found:
        out, lse = attention.forward(call.q, call.k, call.v, *rest)
        attention.backward(use.packed(), out, call.q, call.k, call.v, out, lse, *rest)
    yield from zip(kernels_of(call), found, strict=True)
