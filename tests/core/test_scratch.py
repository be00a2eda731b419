"""Tests of the CPU kernels' scratch memory: what stays after a call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flmoe_kernels import RoutedMLP, expert_attention
from flmoe_kernels.core.native import native
from tests.support.inputs import cumulative, draw

MIB = 1 << 20
THREADS = 6
KEPT: int = native().KEPT_SCRATCH
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")


@pytest.fixture
def one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def train(layer: RoutedMLP) -> None:
    layer(draw(64, layer.d_model)).sum().backward()
    layer.zero_grad()


@contextmanager
def idle_threads(layer: RoutedMLP) -> Iterator[None]:
    """Six threads that each have used the layer, at the same time, and are still alive."""
    begin, used, end = (threading.Barrier(n) for n in (THREADS, THREADS + 1, THREADS + 1))
    x = draw(64, layer.d_model)

    def run() -> None:
        with torch.no_grad():
            begin.wait()
            layer(x)
            used.wait()
            end.wait()

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    used.wait()
    yield
    end.wait()
    for thread in threads:
        thread.join()


@linux
@pytest.mark.usefixtures("one_thread")
def test_idle_threads_keep_no_copies_of_the_weights() -> None:
    """The layer has 48 MiB of weights; what stays does not grow with the number of threads."""
    layer = RoutedMLP(12, d_model=512, d_hidden=1024, top_k=2)
    weights = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert weights > 48 * MIB > KEPT
    before = resident()
    with idle_threads(layer):
        used, kept = native().scratch_bytes()
        assert used == 0
        assert kept <= KEPT
        # Without the bound, six times the weights.
        assert resident() - before < KEPT + THREADS * 4 * MIB < weights + 10 * MIB


@pytest.mark.usefixtures("one_thread")
def test_nothing_of_the_size_of_a_model_stays_after_its_calls() -> None:
    layer = RoutedMLP(12, d_model=512, d_hidden=1024, top_k=2)
    train(layer)
    rows = 2500  # the buffers of one problem are larger than a thread keeps
    q = draw(rows, 1, 64).requires_grad_()
    expert_attention(q, q, q, cumulative([rows])).sum().backward()
    used, kept = native().scratch_bytes()
    assert used == 0
    assert 0 < kept <= KEPT
