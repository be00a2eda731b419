"""Tests of the command `warmup`: later processes find every kernel in Triton's cache."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("triton", reason="the package triton is not installed")

from triton.compiler import ASTSource

from flmoe_kernels.cli.warmup import warmup
from flmoe_kernels.core.backend import TRITON, use_backend
from flmoe_kernels.core.triton.recording import Driver, active, recorded
from flmoe_kernels.core.triton.target import TARGETS, Target
from flmoe_kernels.ops.routing.api import dispatch
from flmoe_kernels.profile.cases import BOTH, BadRequest, cases
from flmoe_kernels.profile.warmup import call_of, target_of, warm_up

app = typer.Typer()
app.command()(warmup)
HOPPER = TARGETS[90]


def compiler_runs(call: Any, folder: Path) -> int:
    """Number of kernels that Triton's front end compiles in a call, in a process without compiled kernels."""
    count = 0
    compiled = ASTSource.make_ir

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return compiled(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setattr(ASTSource, "make_ir", counted)
        with active(Driver(HOPPER)):
            call()
    return count


def dispatched(experts: int = 4) -> None:
    with use_backend(TRITON):
        dispatch(torch.zeros(70, 2, dtype=torch.int64), experts)


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first, again = (warm_up([dispatched, dispatched], HOPPER, jobs=1) for _ in range(2))
    assert not first.failures
    assert first.compiled == again.found > 0
    assert first.found == again.compiled == 0
    assert compiler_runs(dispatched, tmp_path) == 0
    # Negative control: a kernel with another constant.
    assert compiler_runs(lambda: dispatched(5), tmp_path) > 0


def step_of_mimic(folder: str) -> int:
    [case] = cases(["interaction_moe"], ["mimic"], [BOTH], device="cuda")
    return compiler_runs(call_of(case), Path(folder))


@pytest.mark.slow
def test_after_the_command_a_training_step_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler takes a minute."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = "-m flmoe_kernels warmup --op interaction_moe --shape mimic --target sm_90 --jobs 2"
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(step_of_mimic, str(tmp_path)).result() == 0


@pytest.mark.parametrize(
    "case", cases(shapes=["mimic", "routed_short", "pair_base"], phases=[BOTH]), ids=str
)
def test_every_operator_can_be_recorded(case: Any) -> None:
    with recorded(HOPPER) as kernels:
        call_of(case, outputs=True)()
    assert kernels


def test_targets() -> None:
    assert target_of("sm_90") is HOPPER
    assert target_of("sm_103") == Target(103, TARGETS[100].multiprocessors)
    assert target_of("gfx942") is TARGETS["gfx942"]
    for name in ("90", "sm_75", "gfx9"):
        with pytest.raises(BadRequest, match="target: expected a name such as sm_80"):
            target_of(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--target sm_90 --tokens 3,4", "--tokens: does not apply"),
        ("--target sm_90 --op pair_moe --shape mimic", "expected shapes of the operators"),
        ("--target sm_90 --op routing --dtype float64", "float64 is not among"),
    ],
)
def test_requests_that_cannot_be_run(arguments: str, message: str) -> None:
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2
    assert message in result.output
