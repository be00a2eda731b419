"""Tests of backend selection; an explicit choice never falls back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flmoe_kernels import (
    BackendUnavailable,
    InteractionMoE,
    available_backends,
    expert_attention,
    use_backend,
)
from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import native as loading
from tests.support.inputs import cumulative, draw
from tests.support.layers import LayerCase

ROOT = Path(__file__).resolve().parents[2]
X = torch.zeros(1)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_capability_table() -> None:
    half = {torch.float32, torch.bfloat16, torch.float16}
    operators = {"expert_attention", "interaction_moe", "pair_moe", "routing", "routed_mlp"}
    assert set(backends.CAPABILITIES) == operators
    for op, supported in backends.CAPABILITIES.items():
        cuda = {"cuda"} if op == "routing" else set()
        assert set(supported) == {"reference", "cpu", "triton"} | cuda
        for name, dtypes in supported.items():
            assert set(dtypes) == half if name == "triton" else half | {torch.float64}


def test_every_backend_says_whether_it_runs_and_why() -> None:
    status = backends.backend_status()
    assert tuple(status) == backends.BACKENDS == ("reference", "cpu", "triton", "cuda")
    assert all(isinstance(ok, bool) and reason for ok, reason in status.values())
    runs = [name for name in ("triton", "cuda") if status[name][0]]
    assert available_backends() == ("reference", "cpu", *runs)
    assert torch.__version__ in status["reference"][1]
    assert backends.instruction_set() in status["cpu"][1]
    assert "openmp" in status["cpu"][1], "the kernels do not share torch's threads"
    assert "CUDA" in status["cuda"][1] or status["cuda"][0]


@pytest.fixture
def triton_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Simulate a machine with or without the package, a CUDA device and the interpreter."""

    def pretend(*, package: bool = True, device: bool = False, interpreter: bool = False) -> None:
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: package or None)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if device else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")

    return pretend


def on_cuda(dtype: torch.dtype = torch.float32) -> Any:
    """Tensor properties that `choose` reads, for devices that this machine may not have."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


def test_triton_reports_why_it_is_unavailable(triton_machine: Callable[..., None]) -> None:
    x = torch.zeros(1)
    triton_machine(package=False)
    assert backends.backend_status()["triton"] == (False, "the package triton is not installed")
    with pytest.raises(BackendUnavailable, match=r"^pair_moe: .*'triton'.* is not installed$"):
        backends.choose("pair_moe", x, "triton")
    triton_machine()
    with pytest.raises(BackendUnavailable, match="there is no CUDA device, and TRITON_INTERPRET"):
        backends.choose("pair_moe", x, "triton")
    triton_machine(interpreter=True)
    assert backends.choose("pair_moe", x, "triton") == "triton"
    with pytest.raises(BackendUnavailable, match="dtype float64 is not among float32, bfloat16"):
        backends.choose("pair_moe", x.double(), "triton")
    with pytest.raises(BackendUnavailable, match="the tensors are on cuda:0"):
        backends.choose("pair_moe", on_cuda(), "triton")
    triton_machine(device=True)
    assert "triton" in available_backends()
    assert backends.choose("pair_moe", on_cuda(), "triton") == "triton"
    with pytest.raises(BackendUnavailable, match="the tensors are on cpu"):
        backends.choose("pair_moe", x, "triton")


def test_cuda_tensors_use_triton_if_it_runs(triton_machine: Callable[..., None]) -> None:
    triton_machine(device=True)
    assert backends.choose("pair_moe", on_cuda()) == "triton"
    assert backends.choose("pair_moe", on_cuda(torch.float64)) == "reference"
    assert backends.choose("interaction_moe", on_cuda()) == "triton"
    assert backends.choose("pair_moe", torch.zeros(1)) == "cpu"
    triton_machine(package=False, device=True)
    assert backends.choose("pair_moe", on_cuda()) == "reference"
    triton_machine(device=True, interpreter=True)
    assert backends.choose("pair_moe", torch.zeros(1)) == "cpu"


@pytest.mark.parametrize(
    ("op", "name"), [("expert_attention", "cuda"), ("interaction_moe", "cuda")]
)
def test_an_explicit_choice_never_falls_back(op: str, name: str) -> None:
    message = rf"^{op}: backend '{name}' was requested, but this operator has no {name} kernels"
    with pytest.raises(BackendUnavailable, match=message):
        backends.choose(op, X, name)
    with use_backend(name), pytest.raises(BackendUnavailable, match=message):
        call(op)
    assert call(op).isfinite().all()


def call(op: str, backend: str | None = None) -> Tensor:
    if op == "expert_attention":
        q = draw(3, 1, 2)
        out = expert_attention(q, q, q, cumulative([3]), backend=backend)
        assert isinstance(out, Tensor)
        return out
    case = LayerCase()
    return InteractionMoE.adopt(case.reference(), backend=backend)(case.inputs())[2]


@pytest.mark.parametrize("op", ["expert_attention", "interaction_moe"])
def test_the_chosen_backend_is_the_one_that_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("the kernels ran")

    monkeypatch.setattr(loading, "_module", Broken())
    call(op, "reference")
    with use_backend("reference"):
        call(op)
    for run in (lambda: call(op, "cpu"), lambda: call(op)):
        with pytest.raises(RuntimeError, match="the kernels ran"):
            run()


@pytest.mark.parametrize("op", ["expert_attention", "interaction_moe"])
def test_without_the_native_module(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_module", None)
    monkeypatch.setattr(loading, "_reason", "it was not built")
    assert call(op).isfinite().all()
    assert available_backends() == ("reference",)
    assert backends.instruction_set() == "none"
    assert backends.instruction_sets() == ()
    message = rf"^{op}: backend 'cpu' was requested, but it was not built$"
    with pytest.raises(BackendUnavailable, match=message):
        call(op, "cpu")
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match=message):
        call(op)
    with pytest.raises(BackendUnavailable, match="it was not built"):
        backends.native()


def test_the_cpu_backend_refuses_other_devices() -> None:
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    with pytest.raises(BackendUnavailable, match=r"'cpu' was requested, but .* are on cuda:0"):
        backends.choose("expert_attention", x, "cpu")


def test_contexts_nest_and_end() -> None:
    def chosen() -> str:
        return backends.choose("expert_attention", X)

    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("cpu"):
            assert chosen() == "cpu"
            assert backends.choose("expert_attention", X, "reference") == "reference"
        assert chosen() == "reference"
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_unknown_names() -> None:
    message = r"expected one of reference, cpu, triton, cuda, got 'gpu'"
    with pytest.raises(ValueError, match=f"use_backend: {message}"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match=f"backend: {message}"):
        backends.choose("expert_attention", X, "gpu")
    assert backends.choose("expert_attention", X) == "cpu"


CHOICE = """
import torch
from flmoe_kernels import use_backend
from flmoe_kernels.core import backend
print(backend.choose("interaction_moe", torch.zeros(1)))
with use_backend("cpu"):
    print(backend.choose("interaction_moe", torch.zeros(1)))
print(backend.choose("interaction_moe", torch.zeros(1), "cpu"))
"""


def test_environment_variable() -> None:
    """FLMOE_BACKEND is the default of a process; a context and an argument override it."""
    result = run_python(CHOICE, FLMOE_BACKEND="reference")
    assert result.stdout.split() == ["reference", "cpu", "cpu"], result.stderr
    result = run_python(CHOICE, FLMOE_BACKEND="cuda")
    assert "interaction_moe: backend 'cuda' was requested, but" in result.stderr
    result = run_python("import flmoe_kernels", FLMOE_BACKEND="fast")
    assert result.returncode != 0
    assert (
        "FLMOE_BACKEND: expected one of reference, cpu, triton, cuda, got 'fast'" in result.stderr
    )


def test_an_unknown_instruction_set() -> None:
    """With an unknown FLMOE_ISA the cpu backend is unavailable and gives a reason."""
    code = "from flmoe_kernels.core import backend; print(backend.backend_status()['cpu'])"
    result = run_python(code, FLMOE_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert "False" in result.stdout
    assert "FLMOE_ISA: expected avx512, avx2 or baseline, got sse9" in result.stdout


def test_instruction_sets_are_those_of_the_machine() -> None:
    sets = backends.instruction_sets()
    assert sets[-1] == "baseline"
    assert backends.instruction_set() in sets
    if not os.environ.get("FLMOE_ISA"):
        assert backends.instruction_set() == sets[0]
