"""Tests of the availability of routing's CUDA kernels: reasons and side effects."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from flmoe_kernels import BackendUnavailable
from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import native as loading
from flmoe_kernels.core import self_check
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support.programs import output_of
from tests.support.stand_in_gpu import on_cuda

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ON_GPU, WHY_NOT = backends.backend_status()["cuda"]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=f"the kernels do not run here: {WHY_NOT}")
native = backends.native()
pytestmark = pytest.mark.filterwarnings("ignore::flmoe_kernels.core.backend.BackendWarning")


def machine(monkeypatch: pytest.MonkeyPatch, torch_has_one: bool = True, **answers: Any) -> None:
    """Simulate a machine without Triton whose native module returns these values."""
    facts: dict[str, Any] = {
        "cuda_build": ("sm_80 sm_90a sm_100, PTX 80", ""),
        "cuda_versions": (13000, 13000),
        "cuda_devices": (1, ""),
        "cuda_probe": (9, 0, ""),
    } | answers
    fake = ModuleType("fake")
    for name, answer in facts.items():
        setattr(fake, name, lambda *_device, answer=answer: answer)
    fake.instruction_set = lambda: "baseline"  # type: ignore[attr-defined]
    fake.parallel_pool = lambda: "openmp"  # type: ignore[attr-defined]
    monkeypatch.setattr(loading, "_module", fake)
    monkeypatch.setattr(backends, "_triton_status", lambda: (False, "it is not here"))
    monkeypatch.setattr(torch.version, "cuda", "13.0" if torch_has_one else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has_one)
    monkeypatch.setattr(self_check, "_enabled", False)
    monkeypatch.setattr(self_check, "_warned", set())


UNAVAILABLE = [
    (
        {"cuda_build": ("", "nvcc was not found")},
        r"the native module was built without CUDA \(nvcc was not found\)",
    ),
    (
        {"cuda_devices": (0, "no CUDA-capable device is detected"), "torch_has_one": False},
        r"there is no CUDA device \(no CUDA-capable device is detected\)",
    ),
    (
        {"cuda_versions": (13030, 12080), "cuda_devices": (0, "driver version is insufficient")},
        r"the driver, for CUDA 12\.8, is too old: .* with CUDA 13\.3 and need .* for CUDA 13\.0 or",
    ),
    ({"torch_has_one": False}, r"torch \S+ has no CUDA device"),
    (
        {"cuda_probe": (7, 5, "it is older than all of these")},
        r"cuda:0 is sm_75, the kernels are for sm_80 sm_90a sm_100, PTX 80 \(it is older",
    ),
]


@pytest.mark.parametrize(("answers", "message"), UNAVAILABLE)
def test_every_missing_requirement_has_a_reason(
    answers: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **answers)
    ok, reason = backends.backend_status()["cuda"]
    assert not ok
    with pytest.raises(
        BackendUnavailable, match=f"^routing: .*'cuda' was requested, but {message}"
    ):
        backends.choose("routing", on_cuda(), "cuda")
    with pytest.raises(BackendUnavailable, match=message):
        raise BackendUnavailable(reason)
    with pytest.warns(backends.BackendWarning, match=f"because cuda: {message}"):
        assert backends.choose("routing", on_cuda()) == "reference"


def test_a_machine_with_all_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(
        monkeypatch, cuda_versions=(12080, 12020)
    )  # the driver is older, but for the same major version
    details = "kernels for sm_80 sm_90a sm_100, PTX 80, built with CUDA 12.8"
    assert backends.backend_status()["cuda"] == (True, details)
    for dtype in DTYPES:
        assert backends.choose("routing", on_cuda(dtype)) == "cuda"
    assert backends.choose("routed_mlp", on_cuda()) != "cuda"
    with pytest.raises(BackendUnavailable, match="the tensors are on cpu"):
        backends.choose("routing", torch.zeros(1), "cuda")
    with pytest.raises(BackendUnavailable, match="dtype int64 is not among float32, bfloat16"):
        backends.choose("routing", on_cuda(torch.int64), "cuda")


@pytest.mark.skipif(ON_GPU, reason="the kernels run here")
def test_without_a_gpu_the_call_says_why() -> None:
    for call in (
        lambda: gate(torch.zeros(3, 2), 1, backend="cuda"),
        lambda: dispatch(torch.zeros(3, 1, dtype=torch.int64), 2, backend="cuda"),
    ):
        with pytest.raises(BackendUnavailable, match="routing: backend 'cuda' was requested") as e:
            call()
        assert loading.cuda_unavailable_reason() in str(e.value)
        assert loading.cuda_unavailable_reason() in WHY_NOT
    # Without a device nothing is launched; with a device that torch cannot use, these would be null pointers.
    if native.cuda_build()[0] and native.cuda_devices()[0] == 0:
        with pytest.raises(RuntimeError, match="CUDA: "):
            native.cuda_routing_dispatch((0, 0, 0, 0), 0, 1, (0, 0), (0, 0))


def after_asking(code: str) -> str:
    """Output of code in a process that has queried all devices and has not used a GPU otherwise."""
    head = "import ctypes, torch\nfrom flmoe_kernels.core.backend import backend_status\n"
    asked = "assert backend_status()['cuda'][0]\n"
    return output_of(head + asked + code)


CONTEXTS = """
cuda, active, flags = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(-1), ctypes.c_uint()
def contexts():
    for device in range(torch.cuda.device_count()):
        assert cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
        yield active.value
assert cuda.cuInit(0) == 0
print(*contexts())
torch.zeros(1, device="cuda:0")
print(*contexts())
"""


@needs_gpu
def test_device_queries_create_no_context() -> None:
    before, after = after_asking(CONTEXTS).splitlines()
    assert set(before.split()) == {"0"}
    assert after.split()[0] == "1", "control: a tensor creates a context"
