"""Benchmarks of expert_linear with one expert against torch.mm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flmoe_kernels  # noqa: F401  registers the operator
from bench.suite import SECONDS
from flmoe_gate.gate import Against
from flmoe_gate.timing import Call
from flmoe_kernels.core.backend import CPU
from flmoe_kernels.core.dtypes import dtype_name
from flmoe_kernels.core.error_budget import assert_within_budget

# Rows, depth and columns; both matrices of the first product fit into the L2 cache.
SIZES = {"in cache": (96, 256, 256), "out of L2": (1680, 256, 1024)}


@pytest.mark.table
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("place", SIZES)
def test_against_mm(
    benchmark_against: Against, cpu_only: None, full: bool, place: str, dtype: torch.dtype
) -> None:
    rows, depth, columns = SIZES[place]

    linear = torch.ops.flmoe.expert_linear

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)

    def ours() -> Call:
        x, weight = (matrix[None] for matrix in draw())
        return lambda: linear(x, weight, None, CPU)

    def peer() -> Call:
        x, weight = draw()
        return lambda: torch.mm(x, weight.mT)

    x, weight = draw()
    result, exact = linear(x[None], weight[None], None, CPU)[0], x.double() @ weight.double().mT
    assert_within_budget(result, x @ weight.mT, exact, "expert_linear")
    benchmark_against.benchmark.extra_info.update(ours=CPU, peer_version=torch.__version__)
    benchmark_against(
        ours,
        peer,
        name=f"expert_linear/{rows} x {depth} x {columns}/forward/{dtype_name(dtype)}/{place}",
        peer_name="torch.mm",
        fresh=True,
        seconds=SECONDS[full],
        threads=1,
    )
