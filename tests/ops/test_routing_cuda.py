"""Tests of routing's CUDA blocks against the CPU kernels and the reference.

Integers are equal, weights within the error budget. Every case runs on the kernels' twin, which executes the
GPU's blocks on the host with threads, warps and blocks in shuffled order, and on a GPU if there is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels import BackendUnavailable
from flmoe_kernels.core import backend as backends
from flmoe_kernels.core.error_budget import ROUNDING, assert_outside_budget, assert_within_budget
from flmoe_kernels.ops.routing import cpu, reference
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support.inputs import draw, gradients
from tests.support.routing_twin import Gpu, Twin, equal, random_index

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORDERS = (0, 1, 2)
ON_GPU, WHY_NOT = backends.backend_status()["cuda"]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=f"the kernels do not run here: {WHY_NOT}")
native = backends.native()


RUNNERS = [
    *(pytest.param(lambda order=order: Twin(order), id=f"twin{order}") for order in ORDERS),
    pytest.param(Gpu, id="gpu", marks=needs_gpu),
]
Runner = Callable[[], Any]


def hard_logits(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Values with many ties; some rows have NaN, infinities or a constant value."""
    logits = draw(tokens, experts, dtype=torch.float64, seed=tokens + experts, scale=2.0)
    logits = (logits * 4).round() / 4
    if tokens > 8:
        logits[1] = float("nan")
        logits[2, experts // 2] = float("nan")
        logits[3, experts // 3] = float("inf")
        logits[4] = float("-inf")
        logits[5] = 0.5
        logits[6, ::2] = float("-inf")
    return logits.to(dtype)


@pytest.mark.parametrize("make", RUNNERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 65, 256, 257, 300])
def test_gate(experts: int, dtype: torch.dtype, make: Runner) -> None:
    tokens = 67 if experts < 100 else 11
    logits = hard_logits(tokens, experts, dtype)
    runner = make()
    for top_k, over_all in itertools.product({1, min(2, experts), min(9, experts)}, (False, True)):
        index, weight = runner.gate(logits, top_k, over_all)
        name = f"weights of {top_k} of {experts} experts, over_all {over_all}"
        expected = cpu.gate(logits, top_k, over_all)
        low = reference.gate(logits, top_k, over_all)
        assert torch.equal(index, expected[0]), name
        assert torch.equal(index, low[0]), name
        oracle = reference.gate(logits.double(), top_k, over_all)[1]
        assert_within_budget(weight, low[1], oracle, name)
        assert_within_budget(weight, expected[1], oracle, name)
        wrong = weight * (1 + 16 * ROUNDING[dtype] * torch.finfo(dtype).eps)
        assert_outside_budget(wrong, low[1], oracle, name)


@pytest.mark.parametrize("make", RUNNERS)
@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1, 1), (3, 40), (2, 257), (257, 5)])
def test_gate_of_all_experts_and_of_no_tokens(tokens: int, experts: int, make: Runner) -> None:
    logits = hard_logits(tokens, experts, torch.float32)
    found, expected = (one.gate(logits, experts, False) for one in (make(), cpu))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], equal_nan=True)


# The smallest number of rows with several blocks; rows that end inside a block, a warp and a step; more blocks
# than threads of a scan; more bins than a window.
LARGE = [
    (700, 3, 257),
    (8192, 1, 7),
    (8193, 1, 7),
    (8704, 1, 255),
    (5000, 2, 8),
    (40_961, 7, 3),
    (30, 1, 5000),
]


@pytest.mark.parametrize("make", RUNNERS)
@pytest.mark.parametrize(("tokens", "choices", "experts"), [*LARGE, (0, 2, 3), (9, 1, 1)])
def test_limit_and_dispatch(tokens: int, choices: int, experts: int, make: Runner) -> None:
    runner = make()
    index = random_index(tokens, choices, experts, seed=1)
    mask = torch.arange(tokens) % 5 != 2
    for capacity, mask_ in itertools.product((None, max(1, tokens // experts // 2)), (None, mask)):
        kept = cpu.limit(index, mask_, experts, capacity)
        assert torch.equal(runner.limit(index, mask_, experts, capacity), kept)
    for rows in (index, kept):
        assert equal(runner.dispatch(rows, experts), cpu.dispatch(rows, experts))


@pytest.mark.parametrize("make", RUNNERS)
def test_experts_out_of_range_are_dropped(make: Runner) -> None:
    runner, experts = make(), 6
    index = random_index(900, 2, experts, seed=3, spread=4)
    index[0] = torch.tensor([2**62, -(2**63)])
    index[1] = torch.tensor([2**32 + 1, experts])
    inside = torch.where((index < 0) | (index >= experts), -1, index)
    assert not torch.equal(index, inside)
    for capacity in (None, 50):
        expected = cpu.limit(inside, None, experts, capacity)
        assert torch.equal(runner.limit(index, None, experts, capacity), expected)
    assert equal(runner.dispatch(index, experts), cpu.dispatch(inside, experts))


def test_shuffled_orders_detect_a_race() -> None:
    """Negative control: if all threads of a step write to the same place, the result depends on their order."""
    assert native.routing_twin_race(0) == 255
    assert len({native.routing_twin_race(order) for order in range(10)}) > 5


@pytest.mark.parametrize("in_a_warp", [False, True])
def test_the_twin_refuses_other_threads_variables(in_a_warp: bool) -> None:
    """A thread can only read its own variables, although on the host they are in an array of all threads."""
    own = native.routing_twin_peek(in_a_warp, 0)
    assert own == (31 if in_a_warp else 255)
    for apart in (1, 16):
        with pytest.raises(RuntimeError, match="a thread takes another thread's variable"):
            native.routing_twin_peek(in_a_warp, apart)
    assert native.routing_twin_peek(in_a_warp, 0) == own


@needs_gpu
@pytest.mark.parametrize("tokens", [900, 20_000])
def test_a_cuda_graph_captures_gate_limit_and_dispatch(tokens: int) -> None:
    """There is no host synchronization and no data-dependent allocation, so replays use the new logits."""
    logits = draw(tokens, 16).cuda()

    def call() -> tuple[Tensor, ...]:
        index, weight = gate(logits, 2, capacity=tokens // 10)
        return (index, weight, *dispatch(index, 16))

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (1, 2):
        logits.copy_(draw(tokens, 16, seed=seed))
        graph.replay()
        index, weight = gate(logits.cpu(), 2, capacity=tokens // 10, backend="cpu")
        assert torch.equal(captured[0].cpu(), index)
        torch.testing.assert_close(captured[1].cpu(), weight)
        assert equal([x.cpu() for x in captured[2:]], dispatch(index, 16, backend="cpu"))


@needs_gpu
def test_streams_and_gradients_on_the_gpu() -> None:
    logits = draw(3000, 12)
    on_gpu = logits.cuda().requires_grad_()
    with torch.cuda.stream(torch.cuda.Stream()):
        on_gpu.data.add_(0.0)
        found = gate(on_gpu, 3)
        (gradient,) = gradients([found.weight], [on_gpu])
        torch.cuda.current_stream().synchronize()
    leaf = logits.requires_grad_()
    expected = gate(leaf, 3, backend="cpu")
    assert torch.equal(found.index.cpu(), expected.index)
    (wanted,) = gradients([expected.weight], [leaf])
    torch.testing.assert_close(gradient.cpu(), wanted)
    with pytest.raises(BackendUnavailable, match="the tensors are on cpu"):
        gate(logits, 3, backend="cuda")


@needs_gpu
def test_a_call_that_failed_does_not_fail_the_next() -> None:
    index = random_index(900, 2, 8, seed=3)
    with pytest.raises(RuntimeError, match="CUDA: "):
        native.cuda_routing_dispatch((0, 0, 0, 0), 0, 1, (0, 0), (99, 0))
    assert equal(Gpu().dispatch(index, 8), cpu.dispatch(index, 8))
