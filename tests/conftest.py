"""Fixtures that all tests use."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Set before torch loads OpenMP: threads that spin while waiting make small tests slow on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch import Tensor

# No test depends on the clock. The tests of bench/gpu.sh run without hypothesis.
with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import HealthCheck, settings

    settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any")
pytest.register_assert_rewrite("tests.support")


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def fill(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        # Fake tensors of a tracer are not filled.
        if type(out) is Tensor and out.device.type == "cpu":
            if out.dtype.is_floating_point:
                out.detach().fill_(float("nan"))
            elif out.dtype in (torch.int32, torch.int64):
                out.fill_(torch.iinfo(out.dtype).max)
        return out

    return fill


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN and huge integers, so that values that a kernel does not write are noticed."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler() -> None:
    """After an error in compiled code, torch does not compile the same function again in this process."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    """Seed every test independently, and restore the number of threads after it."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
