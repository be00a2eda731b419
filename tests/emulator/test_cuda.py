"""Tests of pair_moe's CUDA C++ kernels, executed by an emulator: nvcc's PTX, launched by the host's code.

Besides values the emulator checks bounds, races, uninitialised reads and asynchronous copies. Compiling the
kernels takes a minute, once for every change of the sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flmoe_kernels import pair_moe
from flmoe_kernels.ops.pair_moe import cuda
from tests.support import pair_cases
from tests.support.inputs import gradients
from tests.support.pair_cases import MANY, PairCase, run
from tests.support.pair_tests import PairTests
from tests.support.ptx import cuda as emulated
from tests.support.ptx import machine
from tests.support.ptx.cuda import emulated_cuda
from tests.support.ptx.memory import Findings
from tests.support.ptx.program import Program
from tests.support.score_tests import KernelScoreTests

pytestmark = pytest.mark.slow

CUDA = "cuda"
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
THREE = ("unique_a", "synergy", "redundancy")
# Two blocks of rows, a ragged step of columns; copies of 16 bytes, single elements.
SMALL = PairCase(40, 24, 16, 24, THREE, batch=1, masks="both")
ODD = PairCase(35, 33, 20, 24, reduce="pool", batch=1, masks="both", top_k=2)
# Several chunks of R; depths in parts.
DEEP_Q = PairCase(20, 18, 200, 40, ("synergy", "redundancy"), masks="a", batch=1)
DEEP_C = PairCase(20, 18, 40, 300, reduce="experts", masks="b", batch=1)
# Call, dtype, KiB of shared memory of a block.
CASES = [
    *((case, dtype, 99) for dtype in pair_cases.DTYPES for case in (SMALL, ODD)),
    # More than four experts, several chunks of V; a padded sample.
    (PairCase(35, 33, 48, 70, MANY, "experts", masks="sample"), BFLOAT16, 99),
    (PairCase(18, 33, 17, 40, MANY, "pool", top_k=3, masks="both", batch=1), FLOAT32, 99),
    (PairCase(17, 9, 16, 12, MANY, top_k=2, masks="b", batch=1), FLOAT64, 99),
    *((DEEP_Q, FLOAT16, kib) for kib in (99, 227)),
    *((DEEP_C, FLOAT32, kib) for kib in (99, 227)),
    (PairCase(33, 1, 64, 8, ("null",), batch=1), BFLOAT16, 99),
]


@pytest.fixture
def findings(request: pytest.FixtureRequest) -> Iterator[Findings]:
    with emulated_cuda(shared_kib=getattr(request, "param", 99)) as found:
        yield found
    assert not found, found


@pytest.mark.parametrize(("case", "dtype", "findings"), CASES, indirect=["findings"], ids=str)
def test_all_results(case: PairCase, dtype: torch.dtype, findings: Findings) -> None:
    pair_cases.check(case, dtype, CUDA)


def test_no_tokens(findings: Findings) -> None:
    for case in (PairCase(0, 3), PairCase(3, 0), PairCase(4, 3, batch=0)):
        pair_cases.check(case, FLOAT32, CUDA)


@pytest.mark.parametrize("findings", [32], indirect=True)
def test_too_little_shared_memory(findings: Findings) -> None:
    with pytest.raises(RuntimeError, match="too little shared memory for these R and V"):
        run(SMALL, SMALL.inputs(FLOAT32), CUDA)


@pytest.mark.usefixtures("findings")
class TestPairMoe(PairTests):
    backend, widest, columns, calls = CUDA, FLOAT64, 20, (("none", 2), ("pool", None))


SCORES = [
    (dataclasses.replace(SMALL, masks="sample", batch=3), BFLOAT16),
    (PairCase(19, 20, 7, 10, MANY, top_k=3, masks="both"), FLOAT16),
    (PairCase(19, 20, 32, 64, masks="both", batch=1), FLOAT16),
    (dataclasses.replace(ODD, top_k=None), FLOAT32),
    (ODD, FLOAT64),
]


@pytest.mark.usefixtures("findings")
class TestScores(KernelScoreTests):
    backend, widest, tied = CUDA, FLOAT64, (5, 40)

    @pytest.fixture(params=SCORES, ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[PairCase, torch.dtype]:
        return request.param


def test_top_pairs_stream_over_rows(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in several launches: the choices of the ones before compete with the next."""
    programs: list[str] = []

    def counted(program: Program, *arguments: Any) -> None:
        programs.append(program.name)
        machine.run(program, *arguments)

    monkeypatch.setattr(emulated, "run", counted)
    monkeypatch.setattr(cuda, "_PAIRS", 5 * 24 * 7)
    TestScores().test_top_pairs_are_the_sorted_map((SMALL, FLOAT32), 30)
    # The map and top_pairs project both sides once.
    assert sum("project" in name for name in programs) == 4 < len(programs) - 4


def test_gradients_that_are_not_requested(findings: Findings) -> None:
    """Each gradient alone has the bits that it has beside all others."""
    inputs = ODD.inputs(FLOAT32)
    every = run(ODD, inputs, CUDA)[2:]
    options = ODD.options()
    for i, want in enumerate(every):
        leaves = [x.requires_grad_(i == n) for n, x in enumerate(map(torch.Tensor.clone, inputs))]
        y, mass = pair_moe(*leaves[:4], gate_bias=leaves[4], reduce="pool", backend=CUDA, **options)
        (grad,) = gradients([y, mass], [leaves[i]])
        assert torch.equal(grad, want)
