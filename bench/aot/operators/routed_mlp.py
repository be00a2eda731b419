"""Launches of routed_mlp: its named shapes, and widths that are no whole tiles or take 64-bit offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.aot import costs
from bench.aot.architectures import Architecture
from bench.aot.cases import ALL, NONE, ONE, Built, Case, dtype_name, meta, stated
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.ops.routed_mlp.triton import launch as launches
from flmoe_kernels.ops.routed_mlp.triton.call import RoutedCall
from flmoe_kernels.profile.shapes import RoutedShape, by_name

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# What each output is computed by: the kernel's row of the launch table.
KERNELS = {"hidden": "hidden", "rows": "rows", "grad_x": "rows", "grad_hidden": "hidden_gradient"}
KERNELS |= {"grad_w_in": "weight_gradient", "grad_w_out": "weight_gradient"}
PRODUCTS = tuple(KERNELS)
OTHERS = ("grad_weight", "sum", "sum_w_in")
_COSTS: dict[str, Callable[..., costs.Work]] = {
    "hidden": costs.routed_hidden,
    "rows": costs.routed_rows,
    "hidden_gradient": costs.routed_hidden_gradient,
    "weight_gradient": costs.routed_weight_gradient,
}
GELU, GELU_TANH, RELU, SILU = range(4)
# Widths that are no whole tiles, and weights of 2^31 elements.
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
    variant: str = ""

    @property
    def sizes(self) -> RoutedShape:
        odd = {shape.name: shape for shape in ODD}
        found = odd.get(self.shape) or by_name(self.shape, "cuda")
        assert isinstance(found, RoutedShape)
        return found

    @property
    def whole(self) -> bool:
        """Whether both widths are whole tiles of every kernel."""
        return self.sizes.width % 128 == 0 and self.sizes.hidden % 128 == 0

    def call(self) -> RoutedCall:
        s = self.sizes
        return RoutedCall(
            meta((s.tokens, s.width), self.dtype),
            meta((s.tokens, s.choices), self.dtype),
            meta((s.experts, s.hidden, s.width), self.dtype),
            meta((s.experts, s.hidden), self.dtype) if self.bias else None,
            meta((s.experts, s.width, s.hidden), self.dtype),
            meta((s.experts, s.width), self.dtype) if self.bias else None,
            meta((s.experts + 1,), torch.int32),
            meta((s.routed_rows,), torch.int32),
            self.act,
        )


def of(shape: str, dtype: torch.dtype = BFLOAT16, variant: str = "", **rest: int) -> RoutedUse:
    return RoutedUse(shape, dtype, rest.get("act", GELU), bool(rest.get("bias", True)), variant)


# (use, outputs, architectures of the quick set). Weight gradients are split at routed_small, and added up.
USES: tuple[tuple[RoutedUse, tuple[str, ...], tuple[int, ...]], ...] = (
    (of("routed_large"), PRODUCTS, ALL),
    (of("routed_large"), OTHERS[:2], ONE),
    (of("routed_small_e4"), ("hidden", "grad_w_in"), ONE),
    (of("routed_small_e4"), ("rows", "grad_hidden", "grad_x", "grad_w_out"), NONE),
    (of("routed_small_e4"), OTHERS, NONE),
    (of("routed_small_e16"), ("rows", "grad_x"), ONE),
    (of("routed_small_e16"), ("hidden", "grad_hidden", "grad_w_in", "grad_w_out", *OTHERS), NONE),
    (of(ODD[0].name), PRODUCTS, NONE),
    (of(ODD[1].name), PRODUCTS, ONE),
    (of(ODD[2].name), PRODUCTS, ONE),
    (of(ODD[3].name), PRODUCTS, NONE),
    (of(ODD[3].name, FLOAT32), PRODUCTS, NONE),
    (of(ODD[4].name), ("grad_x",), NONE),
    (of("routed_large", FLOAT16, "tanh, no bias", act=GELU_TANH, bias=0), ("hidden",), ONE),
    (of("routed_large", FLOAT16, "silu", act=SILU), ("grad_hidden",), ONE),
    (of("routed_large", FLOAT32), PRODUCTS, ONE),
    (of("routed_small_e4", FLOAT32, "relu", act=RELU), ("grad_hidden",), NONE),
)


def cases() -> Iterator[Case]:
    for use, outputs, quick in USES:
        for output in outputs:
            build = partial(built, use, output)
            kind = dtype_name(use.dtype)
            yield Case("routed_mlp", output, use.shape, kind, use.variant, build, quick)


def built(use: RoutedUse, output: str, device: Architecture) -> Built:
    call = use.call()
    launch = dict(launches_of(use, call, device.number))[output]
    kernel = KERNELS.get(output)
    if kernel is None:
        if output == "grad_weight":
            return Built(launch, costs.routed_choice_gradient(launch, use.dtype))
        return Built(launch, costs.work(launch, use.dtype))
    tiles = launches.tiles_for(kernel, call, device.number)
    row = f"{kernel}, {dtype_name(use.dtype)}, {tiles.rows} x {tiles.columns}"
    table = stated(tiles.shared, device)
    work = _COSTS[kernel](launch, use.dtype, call.rows)
    # A loop whose body holds a whole chunk, in steps of 16; or three products of it in steps of 8.
    least = 3 * tiles.deep // 8 if use.dtype == FLOAT32 else tiles.deep // 16
    return Built(launch, work, least, row, table)


def launches_of(use: RoutedUse, call: RoutedCall, number: int) -> Iterator[tuple[str, Launch]]:
    """Every launch of a call by what it computes, on sm_`number`."""
    layer = meta((call.rows, call.hidden), use.dtype)
    parts = meta((call.tokens, call.choices, call.width), use.dtype)
    grad_out, grad_weight = meta(call.x.shape, use.dtype), meta(call.weight.shape, use.dtype)
    dots = meta((call.rows, launches.dot_parts(call, number)), FLOAT32)
    yield "hidden", launches.hidden_launch(call, layer, layer, architecture=number)
    yield "rows", launches.rows_launch(call, layer, parts, architecture=number)
    yield "sum", launches.sum_launch(parts, grad_out)
    saved = (grad_out, layer, layer, layer, dots)
    yield "grad_hidden", launches.hidden_gradient_launch(call, *saved, architecture=number)
    yield "grad_weight", launches.choice_gradient_launch(call, dots, grad_out, grad_weight)
    yield "grad_x", launches.token_gradient_launch(call, layer, parts, architecture=number)
    splits = launches.splits_of(call, number)
    dtype = use.dtype if splits == 1 else FLOAT32
    for name, left, right, weight in (
        ("w_in", (layer, False), (call.x, True), None),
        ("w_out", (grad_out, True), (layer, False), call.weight),
    ):
        p, q = left[0].shape[1], right[0].shape[1]
        grad = meta((call.experts, p, splits, q), dtype)
        bias = meta((call.experts, splits, p), dtype) if use.bias else None
        yield (
            f"grad_{name}",
            launches.weight_gradient_launch(
                call, left, right, grad, bias, weight, architecture=number
            ),
        )
        if splits > 1:
            total = meta((call.experts * p, q), use.dtype)
            yield f"sum_{name}", launches.sum_launch(grad.flatten(0, 1), total)
