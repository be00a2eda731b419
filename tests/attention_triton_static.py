"""Compiles every kernel of expert_attention ahead of time and prints one JSON report a line.

Run by test_attention_triton_static, in a process of its own: the compiler is native code, and a process that
interprets kernels cannot compile them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from flmoe_kernels.expert_attention.triton import launch as launches
from flmoe_kernels.expert_attention.triton.launch import AttentionCall
from flmoe_kernels.triton_runtime import Launch

ARCHITECTURES = (80, 90, 100)
KERNELS = ("attend", "query_gradient", "key_gradient")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """A call on packed q, k, v (groups, rows, 3, heads, width): a shape of SPEC.md, or the widest of a class."""

    name: str
    groups: int
    rows: int
    problems: int
    heads: int
    width: int
    dtype: torch.dtype
    dropout_p: float = 0.5
    kernels: tuple[str, ...] = KERNELS

    def packed(self) -> Tensor:
        return meta((self.groups, self.rows, 3, self.heads, self.width), self.dtype)

    def call(self) -> AttentionCall:
        q, k, v = self.packed().unbind(2)
        seed = meta((), torch.int64) if self.dropout_p else None
        runs = meta((self.problems + 1,), torch.int32)
        return AttentionCall(q, k, v, runs, seed, self.dropout_p, self.width**-0.5)


# Groups are 4 experts with 3 views, or 5 with 4; rows as a GPU packs them, padded ones at the end.
CASES = (
    StaticCase("mmimdb", 12, 32 * 516, 32, 4, 64, BFLOAT16),
    StaticCase("mmimdb, float16", 12, 32 * 516, 32, 4, 64, FLOAT16, 0.0, KERNELS[2:]),
    StaticCase("long", 1, 8192, 1, 4, 64, BFLOAT16, 0.0),
    StaticCase("mimic", 20, 32 * 12, 32, 4, 32, BFLOAT16),
    StaticCase("width 128", 12, 32 * 516, 32, 2, 128, BFLOAT16),
    StaticCase("width 256", 12, 32 * 516, 32, 2, 256, BFLOAT16),
    StaticCase("width 128, float32", 12, 32 * 516, 32, 2, 128, FLOAT32),
    StaticCase("width 256, float32", 12, 32 * 516, 32, 2, 256, FLOAT32),
    StaticCase("mmimdb, float32", 12, 32 * 516, 32, 4, 64, FLOAT32),
    StaticCase("mimic, float32", 20, 32 * 12, 32, 4, 32, FLOAT32),
)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(case: StaticCase) -> Iterator[tuple[str, Launch]]:
    """Every launch of a call by its kernel's name in the table."""
    call = case.call()
    out = meta(tuple(call.q.shape), case.dtype)
    lse = meta(tuple(call.q.shape[:3]), torch.float32)
    grads = case.packed().unbind(2)
    yield KERNELS[0], launches.forward_launch(call, out, lse)
    found = launches.backward_launches(call, out, out, lse, lse, (grads[0], grads[1], grads[2]))
    yield from zip(KERNELS[1:], found, strict=True)


def main() -> None:
    for case in CASES:
        call = case.call()
        for kernel, launch in launches_of(case):
            if kernel not in case.kernels:
                continue
            expected = launches.tiles_of(kernel, call).shared
            for architecture, shared in zip(ARCHITECTURES, expected, strict=True):
                report = dataclasses.asdict(launch.compile(architecture))
                facts = {"case": case.name, "class": launches.class_of(call), "kernel": kernel}
                facts |= {"architecture": architecture, "expected": shared}
                print(json.dumps(facts | report), flush=True)


if __name__ == "__main__":
    main()
