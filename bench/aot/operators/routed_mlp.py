"""Cases of routed_mlp: named shapes, odd widths and 64-bit offsets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.aot.cases import Built, dtype_name, meta, stated
from flmoe_kernels.core.triton.launches import Launch, record
from flmoe_kernels.core.triton.target import Architecture
from flmoe_kernels.ops.routed_mlp import triton
from flmoe_kernels.ops.routed_mlp.call import RoutedCall
from flmoe_kernels.ops.routed_mlp.triton.choice import tiles_of
from flmoe_kernels.ops.routed_mlp.triton.kernels import weight_gradient_kernel
from flmoe_kernels.profile.shapes import RoutedShape, by_name

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# The kernel that computes each output, as named in the launch table.
KERNELS = {"hidden": "hidden", "rows": "rows", "grad_x": "rows", "grad_hidden": "hidden_gradient"}
KERNELS |= {"grad_w_in": "weight_gradient", "grad_w_out": "weight_gradient"}
PRODUCTS = tuple(KERNELS)
OTHERS = ("grad_weight", "sum", "sum_w_in")
# The results whose kernels differ for gated experts.
GATED = ("hidden", "grad_hidden", "grad_x")
GELU, GELU_TANH, RELU, SILU = range(4)
# Widths that are not multiples of a tile, and weights with 2^31 elements.
ODD = (
    RoutedShape("widths 250, 500", 16512, 250, 500, 4, 2),
    RoutedShape("widths 196, 320", 16512, 196, 320, 4, 2),
    RoutedShape("widths 63, 70", 40, 63, 70, 3, 1),
    RoutedShape("widths 255, 511", 4096, 255, 511, 4, 2),
    RoutedShape("widths 65536, 32768", 64, 65536, 32768, 1, 1),
)


@dataclass(frozen=True)
class RoutedUse:
    shape: str
    dtype: torch.dtype
    act: int = GELU
    bias: bool = True
    gated: bool = False
    variant: str = ""

    @property
    def sizes(self) -> RoutedShape:
        odd = {shape.name: shape for shape in ODD}
        shape = odd.get(self.shape) or by_name(self.shape, "cuda")
        assert isinstance(shape, RoutedShape)
        return shape

    def call(self) -> RoutedCall:
        s = self.sizes
        return RoutedCall(
            meta((s.tokens, s.width), self.dtype),
            meta((s.tokens, s.choices), self.dtype),
            meta((s.experts, s.hidden, s.width), self.dtype),
            meta((s.experts, s.hidden), self.dtype) if self.bias else None,
            meta((s.experts, s.width, s.hidden), self.dtype),
            meta((s.experts, s.width), self.dtype) if self.bias else None,
            meta((s.experts, s.hidden, s.width), self.dtype) if self.gated else None,
            meta((s.experts, s.hidden), self.dtype) if self.gated and self.bias else None,
            meta((s.experts + 1,), torch.int32),
            meta((s.routed_rows,), torch.int32),
            self.act,
        )


def of(shape: str, dtype: torch.dtype = BFLOAT16, variant: str = "", **rest: int) -> RoutedUse:
    flags = (bool(rest.get("bias", True)), bool(rest.get("gated", False)))
    return RoutedUse(shape, dtype, rest.get("act", GELU), *flags, variant)


# (use, outputs, quick). At routed_small, weight gradients are computed in parts and summed.
USES: tuple[tuple[RoutedUse, tuple[str, ...], bool], ...] = (
    (of("routed_large"), ("hidden", "rows", "grad_hidden", "grad_w_in", "grad_weight"), True),
    (of("routed_large"), ("grad_x", "grad_w_out", "sum"), False),
    (of("routed_small_e4"), ("hidden", "grad_w_in", "sum_w_in"), True),
    (of("routed_small_e4"), ("rows", "grad_hidden", "grad_x", "grad_w_out", *OTHERS[:2]), False),
    (of("routed_small_e16"), (*PRODUCTS, *OTHERS), False),
    (of(ODD[0].name), PRODUCTS, False),
    (of(ODD[1].name), PRODUCTS, False),
    (of(ODD[2].name), ("hidden",), True),
    (of(ODD[2].name), PRODUCTS[1:], False),
    (of(ODD[3].name), PRODUCTS, False),
    (of(ODD[3].name, FLOAT32), PRODUCTS, False),
    (of(ODD[4].name), ("grad_x",), False),
    (of("routed_large", FLOAT16, "tanh, no bias", act=GELU_TANH, bias=0), ("hidden",), False),
    (of("routed_large", FLOAT16, "silu", act=SILU), ("grad_hidden",), False),
    (of("routed_large", FLOAT32), ("rows",), True),
    (of("routed_large", FLOAT32), tuple(p for p in PRODUCTS if p != "rows"), False),
    (of("routed_small_e4", FLOAT32, "relu", act=RELU), ("grad_hidden",), False),
    (
        of("routed_large", variant="swiglu", act=SILU, bias=0, gated=1),
        ("hidden", "grad_hidden"),
        True,
    ),
    (of("routed_large", variant="geglu", gated=1), GATED, False),
    (of("routed_large", FLOAT16, "geglu", gated=1), GATED, False),
    (of("routed_large", FLOAT32, "geglu", gated=1), GATED, False),
    (of("routed_small_e4", variant="swiglu", act=SILU, gated=1), GATED, False),
    (of("routed_small_e16", variant="geglu tanh", act=GELU_TANH, gated=1), GATED, False),
    (of("routed_small_e16", variant="reglu", act=RELU, gated=1), GATED, False),
    (of("routed_small_e4", FLOAT32, "geglu", gated=1), GATED, False),
    *((of(shape.name, variant="geglu", gated=1), GATED, False) for shape in ODD[:4]),
    (of(ODD[3].name, FLOAT32, "geglu", gated=1), GATED, False),
)


def built(use: RoutedUse, output: str, architecture: Architecture) -> Built:
    call = use.call()
    launch = dict(launches_of(use, call))[output]
    kernel = KERNELS.get(output)
    if kernel is None:
        return Built(launch)
    tiles = tiles_of(kernel, call, architecture)
    row = f"{kernel}, {dtype_name(use.dtype)}, {tiles.rows} x {tiles.columns}"
    # The body of the loop has one chunk in steps of 16; for float32, three products of it in steps of 8.
    least = 3 * tiles.deep // 8 if use.dtype == FLOAT32 else tiles.deep // 16
    if use.gated and output in ("hidden", "grad_x"):
        least *= 2
    return Built(launch, least, row, stated(tiles.shared, architecture))


def launches_of(use: RoutedUse, call: RoutedCall) -> Iterator[tuple[str, Launch]]:
    """Launches of a training step as (result, launch)."""
    of_gate = (use.gated, use.gated and use.bias)
    wants = (True, True, True, use.bias, True, use.bias, *of_gate)
    with record() as forward:
        out, hidden = triton.forward(call, True)
    with record() as backward:
        triton.backward(call, out, hidden, wants)
    yield from zip(("hidden", "rows", "sum"), forward, strict=False)
    yield from zip(("grad_hidden", "grad_weight", "grad_x"), backward, strict=False)
    at = [i for i, each in enumerate(backward) if each.kernel is weight_gradient_kernel]
    yield "grad_w_in", backward[at[0]]
    yield "grad_w_out", backward[at[1]]
    if at[1] > at[0] + 1:
        yield "sum_w_in", backward[at[0] + 1]
