"""Tests of the GPU kernels on a GPU: parity, determinism, CUDA graphs, torch.compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import gate
from flmoe_kernels.profile import first_use
from flmoe_kernels.profile.cases import BOTH, Case
from flmoe_kernels.profile.registry import prepare
from flmoe_kernels.profile.shapes import LayerShape
from flmoe_kernels.profile.warmup import call_of, target_of, warm_up
from tests.support import attention_cases, pair_cases, routed_cases
from tests.support.inputs import as_dtype, draw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS, WHY_NOT = backends.backend_status()["triton"]
# In Triton's interpreter, parity is tested on CPU tensors.
pytestmark = pytest.mark.skipif(not RUNS, reason=f"the kernels do not run here: {WHY_NOT}")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
# The kernels of both 16-bit types differ only in types.
DTYPES = (
    *(torch.float32, torch.bfloat16),
    pytest.param(torch.float16, marks=pytest.mark.slow),
)

PAIRS = (
    pair_cases.PairCase(63, 60, 32, 64),
    pair_cases.PairCase(320, 196, 32, 64, batch=2),
    pair_cases.PairCase(131, 37, 17, 65, reduce="pool"),
)
ROUTED = (
    routed_cases.RoutedCase(300, 32, 64, 4),
    routed_cases.RoutedCase(2000, 256, 512, 16),
    routed_cases.RoutedCase(257, 130, 196, 5, 3, "silu", "dropped"),
    routed_cases.RoutedCase(64, 64, 64, 8, 1, "relu", "hot"),
    routed_cases.RoutedCase(2000, 64, 96, 64, 8, load="zipf"),
    routed_cases.RoutedCase(2000, 256, 512, 16, 2, "silu", bias=False, gated=True),
    routed_cases.RoutedCase(257, 130, 196, 5, 3, "gelu", "dropped", gated=True),
    routed_cases.RoutedCase(300, 1024, 1024, 2, 1, "silu", "hot", gated=True),
)
SMALLEST = routed_cases.RoutedCase(33, 16, 32, 3)
ATTENTION = (
    attention_cases.Case((63, 60, 0, 196), 4, 64, 0.5),
    attention_cases.Case((12,) * 50, 4, 32, 0.1, groups=3),
    attention_cases.Case((700, 1), 2, 128, 0.0, lead=3, tail=5),
)

Run = Callable[[list[Tensor], str], list[Tensor]]


def routed_run(case: routed_cases.RoutedCase) -> Run:
    return lambda inputs, backend: routed_cases.run(
        case, inputs, case.index().to(inputs[0].device), backend
    )


def cuda_run(case: pair_cases.PairCase) -> Run:
    """The CUDA kernels instead of Triton's."""
    return lambda inputs, backend: pair_cases.run(
        case, inputs, "cuda" if backend == "triton" else backend
    )


CASES = (
    *(
        (cuda_run(case), case.inputs, f"pair_moe in CUDA C++:{case}")
        for case in PAIRS
        if backends.backend_status()["cuda"][0]
    ),
    *((partial(pair_cases.run, case), case.inputs, f"pair_moe:{case}") for case in PAIRS),
    (routed_run(SMALLEST), SMALLEST.inputs, "routed_mlp:smallest"),
    *((routed_run(case), case.inputs, f"routed_mlp:{case}") for case in ROUTED),
    *(
        (partial(attention_cases.run, case), case.qkv, f"expert_attention:{case}")
        for case in ATTENTION
    ),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("run", "make", "name"), CASES, ids=[name for *_, name in CASES])
def test_within_the_error_budget_and_the_same_bits_again(
    run: Run, make: Callable[[torch.dtype], list[Tensor]], name: str, dtype: torch.dtype
) -> None:
    """Outputs and all gradients, with the CPU's dropout masks, against the reference in float64."""
    inputs = make(dtype)
    moved = [x.to(DEVICE) for x in inputs]
    first, second = run(moved, "triton"), run(moved, "triton")
    low = run(inputs, "reference")
    oracle = run(as_dtype(inputs, torch.float64), "reference")
    size = max(float(x.abs().max()) for x in oracle[1:])
    for i, (found, again, *rest) in enumerate(zip(first, second, low, oracle, strict=True)):
        assert torch.equal(found, again)
        assert_within_budget(
            found.cpu(), *rest, f"{name} result {i} in {dtype}", magnitude=size, may_vanish=i > 0
        )


def step(x: Tensor, router: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Gate with a capacity, dispatch and MLP, with all gradients."""
    w_in, b_in, w_out, b_out = weights
    index, weight = gate(x @ router, 2, capacity=len(x) // 2)
    out = routed_mlp(x, index, weight.to(x.dtype), w_in, b_in, w_out, b_out)
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, router, *weights])]


@needs_gpu
def test_a_cuda_graph_captures_a_training_step_of_the_routed_mlp() -> None:
    """Nothing synchronizes, and no allocation depends on data, so other tokens use the same graph."""
    case = dataclasses.replace(ROUTED[1], choices=2)
    x, _, *weights = (t.to(DEVICE).requires_grad_() for t in case.inputs(torch.bfloat16))
    router = draw(case.width, case.experts, dtype=torch.bfloat16, seed=7).to(DEVICE)
    router.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x, router, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step(x, router, weights)
    for seed in (11, 12):
        with torch.no_grad():
            x.copy_(draw(*x.shape, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert all(map(torch.equal, held, step(x, router, weights)))


@needs_gpu
def test_a_gpu_finds_the_kernels_that_were_compiled_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With widths that no other test has, so that the process has not loaded these kernels yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = LayerShape("own widths", 32, (5, 3), (4, None), 80, 5, 1, 3)
    case = Case("interaction_moe", shape, BOTH, torch.bfloat16, "cuda")
    assert not warm_up([call_of(case)], target_of(None), jobs=4).failures
    found: list[bool] = []
    compilation = pytest.importorskip("triton").knobs.compilation
    monkeypatch.setattr(compilation, "listener", lambda cache_hit, **_: found.append(cache_hit))
    prepare(case, "triton").call()
    assert found
    assert all(found)


@needs_gpu
def test_compiled_whole() -> None:
    case = ROUTED[1]
    x, _, *weights = (t.to(DEVICE).requires_grad_() for t in case.inputs(torch.bfloat16))
    router = draw(case.width, case.experts, dtype=torch.bfloat16, seed=7).to(DEVICE)
    router.requires_grad_()

    def call(x: Tensor, router: Tensor) -> Tensor:
        index, weight = gate(x @ router, 2, capacity=len(x) // 2)
        return routed_mlp(x, index, weight, *weights)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, router), call(x, router))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", backends.CAPABILITIES)
def test_the_kernels_pass_the_self_check(op: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for backend in {"triton", "cuda"} & set(backends.CAPABILITIES[op]):
        if backends.backend_status()[backend][0]:
            assert first_use.failure(op, backend, dtype, device) == ""
