"""Benchmarks of the layer: regularizers, FLOP rate, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.suite import SECONDS, options
from flmoe_gate.gate import Against
from flmoe_gate.timing import Call
from flmoe_kernels.layers.interaction_moe.regularizers import rep_barlow, rep_cka, rep_cos
from flmoe_kernels.profile.cases import BOTH, FORWARD, Case
from flmoe_kernels.profile.memory import memory_unavailable_reason, peak_bytes
from flmoe_kernels.profile.operators import draws
from flmoe_kernels.profile.registry import default_ours, prepare
from flmoe_kernels.profile.shapes import ENRICO, MMIMDB, is_cuda

MM_SIDE = 2048  # of torch.mm's second matrix
# Of the reference's peak memory.
MEMORY_LIMITS = {BOTH: 1 / 3, FORWARD: 1.0}


@pytest.mark.table
@pytest.mark.parametrize("phase", [FORWARD, BOTH])
def test_flop_rate(benchmark_against: Against, cpu_only: None, full: bool, phase: str) -> None:
    """Rate of the executed FLOP on one thread; the peer is a torch.mm with as many FLOP."""
    case = Case("interaction_moe", ENRICO, phase)
    ours = default_ours(case)
    with FlopCounterMode(display=False) as counter:
        prepare(case, ours).call()
    executed = counter.get_total_flops()

    def product() -> Call:
        a, b = torch.randn(executed // (2 * MM_SIDE**2), MM_SIDE), torch.randn(MM_SIDE, MM_SIDE)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    benchmark_against.benchmark.extra_info.update(ours=ours.name, executed_flop=executed)
    benchmark_against(
        lambda: prepare(case, ours).call,
        product,
        name=f"{case.name}/FLOP rate, one thread",
        peer_name="torch.mm",
        fresh=True,
        seconds=SECONDS[full],
        threads=1,
    )


@pytest.mark.parametrize("batch", [4, 32])
@pytest.mark.parametrize("regularizer", [rep_cos, rep_barlow, rep_cka], ids=lambda f: f.__name__)
def test_regularizers(
    benchmark_against: Against,
    pytestconfig: pytest.Config,
    regularizer: Callable[[list[Tensor]], Tensor],
    batch: int,
) -> None:
    """Forward and backward of a regularizer; the peer is a training step at mmimdb with the same batch."""
    device, full = options(pytestconfig)
    if batch > MMIMDB.batch and not (full or is_cuda(device)):
        pytest.skip("a training step at this batch takes seconds on a CPU; pass --full")
    shape = dataclasses.replace(MMIMDB, batch=batch)
    case = Case("interaction_moe", shape, BOTH, device=device)
    ours = default_ours(case)

    def regularized() -> Call:
        generator = draws.generator_of(device)
        size = (batch, shape.modalities * shape.dim)
        latents = [
            draws.draw(*size, generator=generator).requires_grad_()
            for _ in range(shape.fusion_models)
        ]
        return lambda: torch.autograd.grad(regularizer(latents), latents)

    benchmark_against.benchmark.extra_info.update(ours="torch", peer_version=ours.name)
    benchmark_against(
        regularized,
        lambda: prepare(case, ours).call,
        name=f"{case.name}/{regularizer.__name__} B {batch}",
        peer_name="training step",
        fresh=True,
        device=device,
        seconds=SECONDS[full],
        facts=lambda paired: {"share_of_step": 1.0 / paired.ratio.median},
    )


@pytest.mark.skipif(bool(memory_unavailable_reason("cpu")), reason=memory_unavailable_reason("cpu"))
@pytest.mark.parametrize("direction", MEMORY_LIMITS)
def test_memory(direction: str, cpu_only: None) -> None:
    """Peak memory at mmimdb, relative to the reference."""
    case = Case("interaction_moe", MMIMDB, direction)
    ours, peer = (peak_bytes(case, name) for name in ("cpu", "reference"))
    assert ours is not None
    assert peer is not None
    limit = MEMORY_LIMITS[direction]
    assert ours <= limit * peer, (
        f"{case.name}: expected at most {limit:.2f} of the reference's "
        f"{peer / 2**20:.0f} MiB, measured {ours / 2**20:.0f} MiB"
    )
