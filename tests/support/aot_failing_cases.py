"""Cases of which all but one fail, each for a reason of its own; test_aot_command compiles them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from bench.aot.architectures import Architecture
from bench.aot.cases import CASES, Built, Case, listed, meta
from bench.aot.costs import Work
from flmoe_kernels.core.triton.launches import Launch

SIZE, OTHER_SIZE = 32, 64


@triton.jit
def product_kernel(x, y, out, SIZE: tl.constexpr, BY_SUM: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(x + at[:, None] * SIZE + at[None, :])
    b = tl.load(y + at[:, None] * SIZE + at[None, :])
    if BY_SUM:  # noqa: SIM108
        total = tl.sum(a[:, :, None].to(tl.float32) * b[None, :, :].to(tl.float32), 1)
    else:
        total = tl.dot(a, b)
    tl.store(out + at[:, None] * SIZE + at[None, :], total)


@triton.jit
def wrong_kernel(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.arange(0, SIZE + 1))


def product(by_sum: bool, size: int = SIZE) -> Callable[[Architecture], Built]:
    def build(_device: Architecture) -> Built:
        x, out = meta((size, size), torch.bfloat16), meta((size, size), torch.float32)
        constants = {"SIZE": size, "BY_SUM": by_sum}
        launch = Launch(product_kernel, 1, {"x": x, "y": x, "out": out}, constants, 4, 1)
        return Built(launch, Work(2 * size**3, 0, 3 * size**2, "16"), least=1)

    return build


def capped(device: Architecture) -> Built:
    """The gate of routing with a fraction of the registers that it needs."""
    case = listed(CASES)["routing/gate/routed_large/bfloat16"]
    found = case.built(device)
    launch = dataclasses.replace(found.launch, registers={device.number: 64})
    return dataclasses.replace(found, launch=launch)


def wrong(_device: Architecture) -> Built:
    x = meta((SIZE,), torch.float32)
    launch = Launch(wrong_kernel, 1, {"x": x}, {"SIZE": SIZE}, 4, 1)
    return Built(launch, Work(0, 0, 4 * SIZE, "16"))


def deadly(device: Architecture) -> Built:
    """Ends a process that compiles, as native code may."""
    if sys.argv[1:] == [__name__]:
        sys.stderr.write("an assertion of the compiler\n")
        sys.stderr.flush()
        os._exit(7)
    return product(False, OTHER_SIZE)(device)


def cases() -> Iterator[Case]:
    yield Case("test", "deadly", "bad", "bfloat16", "", deadly)
    yield Case("test", "fine", "good", "bfloat16", "", product(False))
    yield Case("test", "by_sum", "bad", "bfloat16", "", product(True))
    yield Case("test", "capped", "bad", "bfloat16", "", capped)
    yield Case("test", "wrong", "bad", "bfloat16", "", wrong)
