"""Tests of backend selection; an explicit choice never falls back."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flmoe_kernels import (
    BackendUnavailable,
    InteractionMoE,
    PairInteractionMoE,
    RoutedMLP,
    available_backends,
    expert_attention,
    use_backend,
)
from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import native as loading
from flmoe_kernels.core import self_check
from flmoe_kernels.core.triton import release
from flmoe_kernels.core.triton.target import TARGETS
from flmoe_kernels.profile.warmup import warm_up
from tests.support.inputs import cumulative, draw
from tests.support.layers import LayerCase
from tests.support.programs import run_python
from tests.support.stand_in_gpu import new_process, on_cuda

X = torch.zeros(1)


@pytest.fixture
def triton_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Simulate a machine with this version of the package ("": none), with or without a CUDA device and the
    interpreter; without self-checks."""
    new_process(monkeypatch, None)
    monkeypatch.setattr(self_check, "_enabled", False)

    def pretend(
        *, package: str = release.OLDEST, device: bool = False, interpreter: bool = False
    ) -> None:
        monkeypatch.setattr(release, "installed", lambda: package)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if device else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")

    return pretend


def test_triton_reports_why_it_is_unavailable(triton_machine: Callable[..., None]) -> None:
    x = torch.zeros(1)
    triton_machine(package="")
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


@pytest.mark.parametrize(
    ("version", "runs"),
    [
        *(("2.3.1", False), ("3.2.0", False), (release.OLDEST, True), ("3.10.0", True)),
        *((f"{release.OLDEST}.0+git1a2b", True), ("of unknown version", True)),
    ],
)
def test_triton_must_be_new_enough(
    triton_machine: Callable[..., None], version: str, runs: bool
) -> None:
    triton_machine(package=version, device=True)
    x = on_cuda()
    assert backends.backend_status()["triton"][0] == runs
    if runs:
        assert backends.choose("pair_moe", x, "triton") == "triton"
        return
    reason = f"'triton' was requested, but it needs Triton >= {release.OLDEST}, found {version}$"
    with pytest.raises(BackendUnavailable, match=reason):
        backends.choose("pair_moe", x, "triton")
    with pytest.raises(BackendUnavailable, match="warmup: it needs Triton"):
        warm_up([], TARGETS[90], jobs=1)


def test_cuda_tensors_use_triton_if_it_runs(triton_machine: Callable[..., None]) -> None:
    triton_machine(device=True)
    assert backends.choose("pair_moe", on_cuda()) == "triton"
    assert backends.choose("interaction_moe", on_cuda()) == "triton"
    assert backends.choose("pair_moe", torch.zeros(1)) == "cpu"
    triton_machine(device=True, interpreter=True)
    assert backends.choose("pair_moe", torch.zeros(1)) == "cpu"


def test_amd_gpus_use_triton_only_on_request(
    triton_machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_machine(device=True)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    ok, details = backends.backend_status()["triton"]
    assert (ok, details) == (True, f"ROCm 7.0, only on request: {backends._AMD}")
    assert backends.choose("pair_moe", on_cuda(), "triton") == "triton"
    with pytest.warns(backends.BackendWarning, match="never run on one; backend='triton' uses"):
        assert backends.choose("pair_moe", on_cuda()) == "reference"


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
        return expert_attention(q, q, q, cumulative([3]), backend=backend)
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


def test_the_cpu_backend_refuses_other_devices() -> None:
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    with pytest.raises(BackendUnavailable, match=r"'cpu' was requested, but .* are on cuda:0"):
        backends.choose("expert_attention", x, "cpu")


def chosen() -> str:
    return backends.choose("expert_attention", X)


def in_thread(work: Callable[[], object]) -> list[object]:
    """The result of work() in a new thread."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results


def test_contexts_nest_and_end() -> None:
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


def test_a_new_thread_starts_without_the_choice() -> None:
    with use_backend("reference"):
        context = contextvars.copy_context()
        assert in_thread(chosen) == ["cpu"]
        assert in_thread(lambda: context.run(chosen)) == ["reference"]
        assert asyncio.run(asyncio.to_thread(chosen)) == "reference"


def test_the_backward_pass_uses_the_backend_of_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every operator, wherever the backward pass runs."""
    case = LayerCase(gate="GShardGate", sparse=True, layers=2, dropout=0.1)
    layer = InteractionMoE.adopt(case.reference(), backend=None)
    pairs = PairInteractionMoE((8, 8), num_classes=2)
    mlp = RoutedMLP(4, 8, 8, gate="GShardGate")
    q = draw(3, 1, 2).requires_grad_()
    outputs = []
    for name in ("cpu", "reference"):
        with use_backend(name):
            result, pooled = layer(case.inputs()), pairs(case.inputs(), interaction_losses=True)
            attended = expert_attention(q, q, q, cumulative([3]))
            routed = mlp(case.inputs()[0])
            losses = [*result[3], *pooled.losses, mlp.gate_loss()]
            parts = [result[2], pooled.logits, attended, routed]
            outputs.append(sum(x.sum() for x in (*losses, *parts)))
    cpu, reference = outputs

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"the kernels ran: {name}")

    parameters = [p for part in (layer, pairs, mlp) for p in part.parameters()]

    def grads(output: Any) -> list[Tensor]:
        wanted = [*parameters, q]
        return list(torch.autograd.grad(output, wanted, retain_graph=True, allow_unused=True))

    with use_backend("reference"):
        expected = grads(cpu)
    in_other = in_thread(lambda: grads(cpu))[0]
    assert isinstance(in_other, list)
    for found, want in zip(in_other, expected, strict=True):
        assert (found is None) == (want is None)
        assert found is None or torch.equal(found, want)
    monkeypatch.setattr(loading, "_module", Broken())
    grads(reference)
    with use_backend("reference"), pytest.raises(RuntimeError, match="the kernels ran"):
        grads(cpu)


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


def test_an_instruction_set_that_this_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(instruction_set_runs=lambda name: name == "baseline")
    monkeypatch.setattr(loading.importlib, "import_module", lambda name: module)
    monkeypatch.setenv("FLMOE_ISA", "avx512")
    message = "FLMOE_ISA: this processor does not support avx512, expected one of baseline"
    assert loading._load() == (None, message)
