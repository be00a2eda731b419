"""Compiles every kernel of expert_linear ahead of time and prints one JSON report a line.

Run by test_encoder_linear_triton_static, in a process of its own: the compiler is native code, and a process that
interprets kernels cannot compile them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from flmoe_kernels.encoder.triton import linear_launch as launches
from flmoe_kernels.triton_runtime import Launch

ARCHITECTURES = (80, 90, 100)
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = {"out": "product", "grad_x": "product", "grad_weight": "weight_gradient", "sum": None}


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """x (experts, rows, inner) and weights (experts, outer, inner)."""

    name: str
    experts: int
    rows: int
    inner: int
    outer: int
    dtype: torch.dtype
    bias: bool = True
    outputs: tuple[str, ...] = tuple(KERNELS)
    architectures: tuple[int, ...] = ARCHITECTURES

    def meta(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def launches(self) -> Iterator[tuple[str, Launch]]:
        """Every launch of a call by what it computes."""
        x = self.meta(self.experts, self.rows, self.inner)
        weight = self.meta(self.experts, self.outer, self.inner)
        grad_out = self.meta(self.experts, self.rows, self.outer)
        bias = self.meta(self.experts, self.outer) if self.bias else None
        found = launches.forward(x, weight, bias)[1]
        found += launches.backward(grad_out, x, weight, True, True, self.bias)[1]
        # Without a sum where rows are not split.
        yield from zip(KERNELS, found, strict=False)

    def widths(self, output: str) -> tuple[int, int]:
        return (self.inner, self.outer) if output == "out" else (self.outer, self.inner)


# Rows are 3 views of 32 samples of 516 tokens, or 4 of 12, as a GPU packs them; widths those of q with k and v,
# of proj, and of the two layers of the MLP. The others' widths are no whole tiles; those of 63 have elements that
# are read and stored one by one.
MMIMDB, MIMIC = (4, 3 * 32 * 516), (5, 4 * 32 * 12)
ONE, OUT, FEW = (90,), ("out",), ("out", "grad_weight")
CASES = (
    StaticCase("mmimdb, qkv", *MMIMDB, 256, 768, BFLOAT16, bias=False, outputs=FEW),
    StaticCase("mmimdb, proj", *MMIMDB, 256, 256, BFLOAT16, outputs=FEW, architectures=ONE),
    StaticCase("mmimdb, up", *MMIMDB, 256, 512, BFLOAT16),
    StaticCase("mmimdb, down", *MMIMDB, 512, 256, FLOAT16, outputs=FEW, architectures=ONE),
    StaticCase("mimic, qkv", *MIMIC, 128, 384, BFLOAT16, bias=False, architectures=ONE),
    StaticCase("mimic, up", *MIMIC, 128, 256, BFLOAT16, outputs=FEW, architectures=(80,)),
    StaticCase("mmimdb, up, float32", *MMIMDB, 256, 512, FLOAT32),
    StaticCase("mimic, down, float32", *MIMIC, 256, 128, FLOAT32, outputs=FEW, architectures=ONE),
    StaticCase("widths 300 and 200", 4, 4096, 300, 200, BFLOAT16, outputs=FEW),
    StaticCase("widths 63 and 70", 4, 4096, 63, 70, FLOAT16, outputs=FEW, architectures=ONE),
    StaticCase("width 63, float32", 4, 4096, 63, 70, FLOAT32, outputs=FEW, architectures=(80,)),
    StaticCase("width 65536", 1, 4096, 65536, 32768, BFLOAT16, outputs=OUT, architectures=ONE),
)


def main() -> None:
    for case in CASES:
        for output, launch in case.launches():
            if output not in case.outputs:
                continue
            kernel, widths = KERNELS[output], case.widths(output)
            size, expected = None, (None,) * 3
            if kernel is not None:
                size = launches.class_of(kernel, case.dtype, *widths)
                expected = launches.TABLE[kernel, size].shared
            for architecture, shared in zip(ARCHITECTURES, expected, strict=True):
                if architecture not in (case.architectures if kernel else ONE):
                    continue
                report = dataclasses.asdict(launch.compile(architecture))
                facts = {"case": case.name, "output": output, "kernel": kernel, "class": size}
                facts |= {"architecture": architecture, "expected": shared}
                print(json.dumps(facts | report), flush=True)


if __name__ == "__main__":
    main()
