"""Tests of the memory of freed tensors that the CPU kernels reuse."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flmoe_kernels
from flmoe_kernels.core import blocks
from flmoe_kernels.core.blocks import LEAST_BYTES, Blocks

LARGE = (LEAST_BYTES // 2,)  # of float32: twice the least size


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    fresh = Blocks()
    monkeypatch.setattr(blocks, "_BLOCKS", fresh)
    return fresh


def empty(*shape: int) -> torch.Tensor:
    return blocks.empty(shape or LARGE, torch.float32)[0]


def kept(pool: Blocks) -> int:
    return sum(size * len(found) for size, found in pool._blocks.items())


def test_the_memory_of_a_freed_tensor_is_used_again(pool: Blocks) -> None:
    first = empty()
    address = first.data_ptr()
    assert first.is_contiguous()
    del first
    # A few percent smaller: another number of valid tokens.
    again = empty(LARGE[0] - LARGE[0] // 50)
    assert again.data_ptr() == address
    assert empty().data_ptr() != address


USERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda x: x[5:],
    "storage": lambda x: x.untyped_storage(),
    "numpy": lambda x: x.numpy(),
    "saved for the backward": lambda x: torch.ones(1, requires_grad=True) * x,
}


@pytest.mark.parametrize("use", USERS)
def test_memory_in_use_is_not_taken(pool: Blocks, use: str) -> None:
    x = empty().fill_(3.0)
    user, address = USERS[use](x), x.data_ptr()
    del x
    assert empty().data_ptr() != address
    del user
    assert address in (empty().data_ptr(), empty().data_ptr())


def test_shared_memory_does_not_belong_to_the_block(pool: Blocks) -> None:
    """Another process may still read it after the tensor is freed."""
    x = empty().fill_(1.0)
    address = x.data_ptr()
    x.share_memory_()
    assert x.data_ptr() != address
    again = empty()
    assert again.data_ptr() == address
    again.fill_(2.0)
    assert (x == 1.0).all()


def test_a_saved_tensor_has_no_bytes_of_others(pool: Blocks) -> None:
    x = empty(LARGE[0] + 3)
    assert x.untyped_storage().nbytes() == x.nbytes


def test_the_default_device_has_no_effect(pool: Blocks) -> None:
    with torch.device("meta"):
        assert empty().is_cpu
        assert empty(3).is_cpu


def test_memory_is_limited_by_what_was_in_use_at_once(pool: Blocks) -> None:
    for i in range(1, 60):
        x = empty(LARGE[0] * i)
        del x
    assert kept(pool) <= 1.25 * 1.125 * 4 * LARGE[0] * 59
    flmoe_kernels.empty_cache()
    assert kept(pool) == 0


def test_threads_never_share_a_block(pool: Blocks) -> None:
    failures: list[str] = []

    def work(value: float) -> None:
        for _ in range(300):
            x = empty().fill_(value)
            if not bool((x == value).all()):
                failures.append(f"{value} was overwritten")

    workers = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
