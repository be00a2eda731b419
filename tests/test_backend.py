"""Which backend a call gets, and that an explicit choice never falls back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels import (
    BackendUnavailable,
    InteractionMoE,
    available_backends,
    expert_attention,
    use_backend,
)
from flmoe_kernels import backend as backends
from flmoe_kernels.testing import LayerCase, cumulative, draw

ROOT = Path(__file__).resolve().parents[1]
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
    floats = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
    assert set(backends.CAPABILITIES) == {"expert_attention", "interaction_moe"}
    for supported in backends.CAPABILITIES.values():
        assert set(supported) == {"reference", "cpu"}
        assert all(set(dtypes) == floats for dtypes in supported.values())


def test_every_backend_says_whether_it_runs_and_why() -> None:
    status = backends.backend_status()
    assert tuple(status) == backends.BACKENDS == ("reference", "cpu", "triton", "cuda")
    assert all(isinstance(ok, bool) and reason for ok, reason in status.values())
    assert available_backends() == ("reference", "cpu")
    assert torch.__version__ in status["reference"][1]
    assert backends.instruction_set() in status["cpu"][1]
    assert "openmp" in status["cpu"][1], "the kernels do not share torch's threads"
    for name in ("triton", "cuda"):
        assert "no operator of this version has kernels" in status[name][1]


def test_choice_without_a_wish() -> None:
    for op in backends.CAPABILITIES:
        assert backends.choose(op, X) == "cpu"
        assert backends.choose(op, X.to("meta")) == "reference"
        assert backends.choose(op, X.double()) == "cpu"
    with pytest.raises(BackendUnavailable, match=r"^expert_attention: dtype int64 is not among"):
        backends.choose("expert_attention", X.long())


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("op", ["expert_attention", "interaction_moe"])
def test_an_explicit_choice_never_falls_back(op: str, name: str) -> None:
    message = rf"^{op}: backend '{name}' was asked for, but this operator has no {name} kernels"
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

    monkeypatch.setattr(backends, "_native", Broken())
    call(op, "reference")
    with use_backend("reference"):
        call(op)
    for run in (lambda: call(op, "cpu"), lambda: call(op)):
        with pytest.raises(RuntimeError, match="the kernels ran"):
            run()


@pytest.mark.parametrize("op", ["expert_attention", "interaction_moe"])
def test_without_the_native_module(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "_native_reason", "it was not built")
    assert call(op).isfinite().all()
    assert available_backends() == ("reference",)
    assert backends.instruction_set() == "none"
    assert backends.instruction_sets() == ()
    message = rf"^{op}: backend 'cpu' was asked for, but it was not built$"
    with pytest.raises(BackendUnavailable, match=message):
        call(op, "cpu")
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match=message):
        call(op)
    with pytest.raises(BackendUnavailable, match="it was not built"):
        backends.native()


def test_the_cpu_backend_refuses_other_devices() -> None:
    with pytest.raises(BackendUnavailable, match=r"'cpu' was asked for, but .* are on meta"):
        backends.choose("expert_attention", X.to("meta"), "cpu")


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
from flmoe_kernels import backend, use_backend
print(backend.choose("interaction_moe", torch.zeros(1)))
with use_backend("cpu"):
    print(backend.choose("interaction_moe", torch.zeros(1)))
print(backend.choose("interaction_moe", torch.zeros(1), "cpu"))
"""


def test_environment_variable() -> None:
    """FLMOE_BACKEND is the default of a process; a context and a call go before it."""
    result = run_python(CHOICE, FLMOE_BACKEND="reference")
    assert result.stdout.split() == ["reference", "cpu", "cpu"], result.stderr
    result = run_python(CHOICE, FLMOE_BACKEND="cuda")
    assert "interaction_moe: backend 'cuda' was asked for, but" in result.stderr
    result = run_python("import flmoe_kernels", FLMOE_BACKEND="fast")
    assert result.returncode != 0
    assert (
        "FLMOE_BACKEND: expected one of reference, cpu, triton, cuda, got 'fast'" in result.stderr
    )


def test_an_instruction_set_that_cannot_be_had() -> None:
    """An unknown FLMOE_ISA leaves no cpu backend, with the reason."""
    code = "import flmoe_kernels as f; print(f.backend.backend_status()['cpu'])"
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
