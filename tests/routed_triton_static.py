"""Compiles the kernels of routing and of routed_mlp ahead of time and prints one JSON report a line; run by
test_triton_static, in a process of its own: one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from flmoe_kernels.routed_mlp.triton import launch as launches
from flmoe_kernels.routed_mlp.triton import routing_launch as routing
from flmoe_kernels.routed_mlp.triton.call import RoutedCall
from flmoe_kernels.triton_runtime import Launch

ARCHITECTURES = (80, 90, 100)
KERNELS = {"hidden": "hidden", "rows": "rows", "grad_x": "rows", "grad_hidden": "hidden_gradient"}
KERNELS |= {"grad_w_in": "weight_gradient", "grad_w_out": "weight_gradient"}
SPLIT = ("grad_w_in", "grad_w_out")
ROUTING = ("gate", "count", "scan", "place", "limit")
# Nothing in these depends on the architecture: they are compiled for sm_90.
ONCE = ("grad_weight", "sum", *ROUTING)
# (N, K, E, D, F): SPEC.md's, widths that are no whole tiles, and weights of 2^31 elements.
SMALL_4, SMALL_16 = (16512, 2, 4, 256, 512), (16512, 2, 16, 256, 512)
LARGE = (16384, 8, 64, 2048, 1024)
ODD, HALF, LESS = (16512, 2, 4, 250, 500), (16512, 2, 4, 196, 320), (40, 1, 3, 63, 70)
HUGE = (64, 1, 1, 65536, 32768)
GELU, GELU_TANH, RELU, SILU = range(4)


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """A shape, and outputs to compile; the weight gradients are split at routed_small."""

    name: str
    sizes: tuple[int, int, int, int, int]
    dtype: torch.dtype
    outputs: tuple[str, ...]
    act: int = GELU
    bias: bool = True
    splits: int = 1
    architectures: tuple[int, ...] = ARCHITECTURES

    @property
    def whole(self) -> bool:
        """Whether both widths are whole tiles of every kernel."""
        return all(width % 128 == 0 for width in self.sizes[3:])

    def call(self) -> RoutedCall:
        tokens, choices, experts, width, hidden = self.sizes
        return RoutedCall(
            meta((tokens, width), self.dtype),
            meta((tokens, choices), self.dtype),
            meta((experts, hidden, width), self.dtype),
            meta((experts, hidden), self.dtype) if self.bias else None,
            meta((experts, width, hidden), self.dtype),
            meta((experts, width), self.dtype) if self.bias else None,
            meta((experts + 1,), torch.int32),
            meta((tokens * choices,), torch.int32),
            self.act,
        )


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    StaticCase("bfloat16", LARGE, BFLOAT16, (*KERNELS, *ONCE)),
    StaticCase("bfloat16, E 4", SMALL_4, BFLOAT16, ("hidden", "grad_hidden", *SPLIT), splits=8),
    StaticCase("bfloat16, E 16", SMALL_16, BFLOAT16, ("rows", "grad_x"), architectures=(90,)),
    StaticCase("bfloat16, D 250", ODD, BFLOAT16, tuple(KERNELS), architectures=(90,)),
    StaticCase("bfloat16, D 196", HALF, BFLOAT16, tuple(KERNELS), architectures=(90,)),
    StaticCase("bfloat16, D 63", LESS, BFLOAT16, ("hidden", "grad_hidden")),
    StaticCase("bfloat16, D 65536", HUGE, BFLOAT16, ("grad_x",), architectures=(90,)),
    StaticCase("float16", LARGE, FLOAT16, ("hidden", "gate"), GELU_TANH, bias=False),
    StaticCase("float16, silu", LARGE, FLOAT16, ("grad_hidden",), SILU),
    StaticCase("float32", LARGE, FLOAT32, tuple(KERNELS)),
    StaticCase("float32, relu", SMALL_4, FLOAT32, ("grad_hidden",), RELU, architectures=(90,)),
)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(case: StaticCase) -> Iterator[tuple[str, Launch]]:
    """Every launch of a call by what it computes."""
    call = case.call()
    layer = meta((call.rows, call.hidden), case.dtype)
    parts = meta((call.tokens, call.choices, call.width), case.dtype)
    grad_out, grad_weight = meta(call.x.shape, case.dtype), meta(call.weight.shape, case.dtype)
    dots = meta((call.rows, launches.dot_parts(call)), FLOAT32)
    yield "hidden", launches.hidden_launch(call, layer, layer)
    yield "rows", launches.rows_launch(call, layer, parts)
    yield "sum", launches.sum_launch(parts, grad_out)
    yield (
        "grad_hidden",
        launches.hidden_gradient_launch(call, grad_out, layer, layer, layer, dots),
    )
    yield "grad_weight", launches.choice_gradient_launch(call, dots, grad_out, grad_weight)
    yield "grad_x", launches.token_gradient_launch(call, layer, parts)
    dtype = case.dtype if case.splits == 1 else FLOAT32
    for name, left, right, weight in (
        ("grad_w_in", (layer, False), (call.x, True), None),
        ("grad_w_out", (grad_out, True), (layer, False), call.weight),
    ):
        p, q = left[0].shape[1], right[0].shape[1]
        grad = meta((call.experts, p, case.splits, q), dtype)
        bias = meta((call.experts, case.splits, p), dtype) if case.bias else None
        yield name, launches.weight_gradient_launch(call, left, right, grad, bias, weight)
    yield from routing_of(case)


def routing_of(case: StaticCase) -> Iterator[tuple[str, Launch]]:
    tokens, choices, experts, *_ = case.sizes
    index = meta((tokens, choices), torch.int64)
    mask = meta((tokens,), torch.bool)
    weight = meta((tokens, choices), case.dtype)
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
    yield "gate", routing.gate_launch(meta((tokens, experts), case.dtype), index, weight, True)
    counting = routing.count_launches(index, mask, before, totals)
    yield from zip(("count", "scan"), counting, strict=True)
    yield "place", routing.place_launch(index, before, totals, counts, offsets, permutation)
    yield "limit", routing.limit_launch(index, mask, before, index, experts, 1000)


def products_by(ttir: str, factor: int) -> list[str]:
    """The types of the products of a scalar that is no constant with `factor`."""
    found = []
    for kind in ("i32", "i64"):
        constants = re.findall(rf"(%\S+) = arith\.constant {factor} : {kind}\b", ttir)
        products = re.findall(rf"arith\.muli (%[^\s,]+), (%\S+) : {kind}\b", ttir)
        found += [kind for pair in products if set(pair) & set(constants)]
    return found


class Listener:
    """Keeps the text of the first stage of the last compilation."""

    ttir = ""

    def __call__(self, metadata_group: dict[str, str], **_others: Any) -> None:
        path = next(path for name, path in metadata_group.items() if name.endswith(".ttir"))
        self.ttir = Path(path).read_text()


def main() -> None:
    triton.knobs.compilation.listener = listener = Listener()
    for case in CASES:
        for output, launch in launches_of(case):
            if output not in case.outputs:
                continue
            kernel = KERNELS.get(output)
            expected = launches.tiles_of(kernel, case.dtype).shared if kernel else (None,) * 3
            for architecture, shared in zip(ARCHITECTURES, expected, strict=True):
                if architecture not in ((90,) if output in ONCE else case.architectures):
                    continue
                report = dataclasses.asdict(launch.compile(architecture))
                facts = {"case": case.name, "output": output, "warps": launch.warps}
                facts |= {"kernel": kernel, "architecture": architecture, "expected": shared}
                facts |= {"whole": case.whole, "width": case.sizes[3]}
                facts |= {"by_width": products_by(listener.ttir, case.sizes[3])}
                print(json.dumps(facts | report), flush=True)


if __name__ == "__main__":
    main()
