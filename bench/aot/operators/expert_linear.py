"""Cases of expert_linear: training steps of the layer and odd widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.aot.cases import Built, meta, stated
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.encoder.triton import linear_launch as launches
from flmoe_kernels.ops.encoder.triton.view_rows import ALL, ViewRows
from flmoe_kernels.profile.shapes import LayerShape, by_name

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# The kernel that computes each output, as named in the launch table.
KERNELS = {"out": "product", "grad_x": "product", "grad_weight": "weight_gradient"}
# Matrix instructions per chunk: depth 64 in steps of 16; half of that; depth 32 in steps of 8, three times.
LEAST = {"16 bit": 4, "ragged": 2, "float32": 12}


@dataclass(frozen=True)
class LinearUse:
    """x (experts, rows, inner) and weights (experts, outer, inner)."""

    shape: str
    dtype: torch.dtype
    experts: int
    rows: int
    inner: int
    outer: int
    bias: bool = True
    variant: str = ""
    computed: ViewRows = ALL

    def widths(self, output: str) -> tuple[int, int]:
        """INNER and OUTER of a product, or P and Q of a weight gradient."""
        return (self.inner, self.outer) if output == "out" else (self.outer, self.inner)


def of_layer(name: str, dtype: torch.dtype, layer: str, *, counted: bool = False) -> LinearUse:
    """A linear layer for all views of all experts; rows packed as on a GPU, padding last. counted: the number of
    valid rows is on the GPU."""
    s = by_name(name, "cuda")
    assert isinstance(s, LayerShape)
    inner, outer = {"qkv": (1, 3), "proj": (1, 1), "up": (1, 2), "down": (2, 1)}[layer]
    rows = s.views * s.batch * sum(s.padded_tokens)
    sizes = (s.fusion_models, rows, inner * s.dim, outer * s.dim)
    computed = ViewRows(meta((1,), torch.int32), s.views) if counted else ALL
    variant = f"{layer}, count" if counted else layer
    return LinearUse(name, dtype, *sizes, layer != "qkv", variant, computed)


def odd(inner: int, outer: int, dtype: torch.dtype, experts: int = 4) -> LinearUse:
    return LinearUse(f"widths {inner}, {outer}", dtype, experts, 4096, inner, outer)


EVERY = (*KERNELS, "sum")
COUNTED, HALF_AND_FULL = tuple(KERNELS), (BFLOAT16, FLOAT32)
OUT, FEW, GRADIENTS = ("out",), ("out", "grad_weight"), ("grad_x", "sum")
# (use, outputs, quick).
USES: tuple[tuple[LinearUse, tuple[str, ...], bool], ...] = (
    (of_layer("mmimdb", BFLOAT16, "up"), ("out", "grad_weight", "sum"), True),
    (of_layer("mmimdb", BFLOAT16, "up"), ("grad_x",), False),
    (of_layer("mmimdb", BFLOAT16, "qkv"), ("grad_weight",), True),
    (of_layer("mmimdb", BFLOAT16, "qkv"), ("out", *GRADIENTS), False),
    *((of_layer("mmimdb", kind, "up", counted=True), COUNTED, False) for kind in HALF_AND_FULL),
    *((of_layer("mmimdb", kind, "qkv", counted=True), COUNTED, False) for kind in HALF_AND_FULL),
    (of_layer("mmimdb", BFLOAT16, "proj"), EVERY, False),
    (of_layer("mmimdb", BFLOAT16, "down"), EVERY, False),
    (of_layer("mmimdb", FLOAT16, "down"), FEW, False),
    (of_layer("enrico", BFLOAT16, "up"), EVERY, False),
    (of_layer("mimic", BFLOAT16, "up"), FEW, False),
    (of_layer("mimic", BFLOAT16, "qkv"), FEW, False),
    (of_layer("mmimdb", FLOAT32, "up"), OUT, True),
    (of_layer("mmimdb", FLOAT32, "up"), ("grad_weight", *GRADIENTS), False),
    (of_layer("mimic", FLOAT32, "down"), FEW, False),
    (odd(300, 200, BFLOAT16), FEW, True),
    (odd(63, 70, FLOAT16), FEW, False),
    (odd(63, 70, FLOAT32), FEW, False),
    (odd(65536, 32768, BFLOAT16, 1), OUT, False),
)


def built(use: LinearUse, output: str, architecture: Architecture) -> Built:
    launch = dict(launches_of(use))[output]
    kernel = KERNELS.get(output)
    if kernel is None:
        return Built(launch)
    row = launches.class_of(kernel, use.dtype, *use.widths(output))
    table = stated(launches.TABLE[kernel, row].shared, architecture)
    return Built(launch, LEAST[row], f"{kernel}, {row}", table)


def launches_of(use: LinearUse) -> Iterator[tuple[str, Launch]]:
    """Launches of the forward and of all gradients; without "sum" if rows are not split."""
    x = meta((use.experts, use.rows, use.inner), use.dtype)
    weight = meta((use.experts, use.outer, use.inner), use.dtype)
    bias = meta((use.experts, use.outer), use.dtype) if use.bias else None
    grad_out = meta((use.experts, use.rows, use.outer), use.dtype)
    yield "out", launches.forward(x, weight, bias, use.computed)[1][0]
    _, backward = launches.backward(grad_out, x, weight, True, True, use.bias, use.computed)
    yield from zip(("grad_x", "grad_weight", "sum"), backward, strict=False)
