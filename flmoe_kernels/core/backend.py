"""Which backends exist, what each can do here, and which one a call gets.

A backend is named explicitly by `backend=` on a call, by `use_backend(...)` around it, or by the environment
variable FLMOE_BACKEND (read at import); an explicit choice never falls back, it raises with the reason.
Without one, CUDA tensors go to the GPU backends and CPU tensors to the C++ kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

REFERENCE, CPU, TRITON, CUDA = "reference", "cpu", "triton", "cuda"
BACKENDS = (REFERENCE, CPU, TRITON, CUDA)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# operator -> backend -> dtypes. An operator that a backend lacks has no row: that is a fact, not a gap to hide.
CAPABILITIES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    op: {REFERENCE: (*_FLOATS, torch.float64), CPU: (*_FLOATS, torch.float64)}
    for op in ("expert_attention", "interaction_moe", "pair_moe", "routing", "routed_mlp")
}
for op in ("expert_attention", "interaction_moe", "pair_moe", "routing", "routed_mlp"):
    CAPABILITIES[op][TRITON] = _FLOATS
CAPABILITIES["routing"][CUDA] = (*_FLOATS, torch.float64)

# What a CUDA tensor gets, best first, where the operator and the machine have it.
_ON_CUDA = (CUDA, TRITON)


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run this call; the message says why."""


def _load_native() -> tuple[ModuleType | None, str]:
    # After torch: the native module shares the OpenMP pool that torch has loaded.
    try:
        module = importlib.import_module("flmoe_kernels._native")
        module.instruction_set()
    except ImportError as error:
        return None, f"the native module is not built or cannot be loaded ({error})"
    except RuntimeError as error:  # FLMOE_ISA names what this processor cannot run
        return None, str(error)
    return module, ""


_native, _native_reason = _load_native()


def native() -> ModuleType:
    """The native module; BackendUnavailable if it was not built."""
    if _native is None:
        raise BackendUnavailable(f"backend 'cpu': {_native_reason}")
    return _native


def native_cuda() -> ModuleType:
    """The native module if it has the CUDA kernels, whatever the machine; BackendUnavailable if not."""
    reason = _unbuilt_cuda()
    if reason:
        raise BackendUnavailable(f"backend 'cuda': {reason}")
    return native()


def instruction_set() -> str:
    """The instruction set that the CPU kernels chose ("avx512", "avx2", "baseline"), or "none"."""
    return "none" if _native is None else str(_native.instruction_set())


def instruction_sets() -> tuple[str, ...]:
    """Those that this processor can run, best first; FLMOE_ISA picks one."""
    if _native is None:
        return ()
    runs = _native.instruction_set_runs
    return tuple(name for name in ("avx512", "avx2", "baseline") if runs(name))


def backend_status() -> dict[str, tuple[bool, str]]:
    """For every backend whether it can run on this machine, and why (not)."""
    status = {
        REFERENCE: (True, f"PyTorch {torch.__version__}"),
        CPU: (False, _native_reason)
        if _native is None
        else (True, f"{instruction_set()}, {_native.parallel_pool()} pool"),
    }
    status[TRITON] = _triton_status()
    status[CUDA] = _cuda_status()
    return status


def _triton_status() -> tuple[bool, str]:
    """Looked up on each call, without importing triton, which takes seconds."""
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if _interpreted():
        return True, "Triton's interpreter, slowly, on CPU tensors (TRITON_INTERPRET=1)"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False, "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return True, f"CUDA {torch.version.cuda}"


def _cuda_status() -> tuple[bool, str]:
    """Looked up on each call, by the attributes of the devices: none is made ready."""
    reason = _unbuilt_cuda()
    if reason:
        return False, reason
    assert _native is not None
    architectures = _native.cuda_build()[0]
    reason = _cuda_lack()
    if reason:
        return False, f"{reason}; kernels were built, for {architectures}"
    refusals = [_cuda_lack(device) for device in range(_native.cuda_devices()[0])]
    if all(refusals):
        return False, refusals[0]
    return True, f"kernels for {architectures}"


def _unbuilt_cuda() -> str:
    """Why there are no CUDA kernels that could be called, or ""."""
    if _native is None:
        return _native_reason
    architectures, reason = _native.cuda_build()
    return "" if architectures else f"the native module was built without CUDA ({reason})"


def _constant_in_traces(function: Callable[..., str]) -> Callable[..., str]:
    """For what the compiler cannot look into, and need not: this machine does not change under a trace."""
    # All that torch.compiler.assume_constant_result does, but it imports the compiler, which takes seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_in_traces
def _cuda_lack(device: int | None = None) -> str:
    """Why no device can run the CUDA kernels, or why this one cannot; "" where nothing is in the way."""
    reason = _unbuilt_cuda()
    if reason:
        return reason
    assert _native is not None
    devices, reason = _native.cuda_devices()
    torch_has_one = torch.version.cuda is not None and torch.cuda.is_available()
    if not devices and torch_has_one:
        return (
            f"the driver is too old for the CUDA that the native module was built with ({reason})"
        )
    if not devices:
        return f"there is no CUDA device ({reason or 'none is visible'})"
    if not torch_has_one:
        return f"torch {torch.__version__} has no CUDA device"
    return "" if device is None else _device_lack(_native, device)


def _device_lack(module: ModuleType, device: int) -> str:
    """Asked anew each time, which costs a look into a table: what fails now may work later."""
    major, minor, message = module.cuda_probe(device)
    if not message:
        return ""
    name = f"cuda:{device} is sm_{major}{minor}" if major else f"cuda:{device} does not answer"
    return f"{name}, the kernels are for {module.cuda_build()[0]} ({message})"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    return tuple(name for name, (ok, _) in backend_status().items() if ok)


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_environment = os.environ.get("FLMOE_BACKEND") or None
if _environment is not None:
    _known(_environment, "FLMOE_BACKEND")
_forced: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every call inside the `with` block, in any thread, uses this backend, unless it names one itself."""
    _forced.append(_known(name, "use_backend"))
    try:
        yield
    finally:
        _forced.pop()


def choose(op: str, tensor: torch.Tensor, backend: str | None = None) -> str:
    """The backend for one call of `op` on tensors like `tensor`.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailable: the chosen backend cannot run this; names the operator, backend and reason.
    """
    explicit = backend
    if explicit is None:
        explicit = _forced[-1] if _forced else _environment
    if explicit is not None:
        name = _known(explicit, "backend")
    elif tensor.device.type == "cpu" and (_native is not None or os.environ.get("FLMOE_ISA")):
        # FLMOE_ISA asks for the CPU kernels: when it names what cannot run, that is an error to show.
        name = CPU
    elif tensor.device.type == "cuda":
        for name in _ON_CUDA:
            if not _refusal(op, name, tensor):
                return name
        name = REFERENCE
    else:
        name = REFERENCE
    reason = _refusal(op, name, tensor)
    if reason:
        if explicit is None:
            raise BackendUnavailable(f"{op}: {reason}")
        raise BackendUnavailable(f"{op}: backend {name!r} was asked for, but {reason}")
    return name


def _refusal(op: str, name: str, tensor: torch.Tensor) -> str:
    supported = CAPABILITIES[op]
    if name not in supported:
        return f"this operator has no {name} kernels in this version"
    if name == CPU:
        if _native is None:
            return _native_reason
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device}"
    if name == TRITON:
        runs, reason = _triton_status()
        if not runs:
            return reason
        if tensor.device.type != ("cpu" if _interpreted() else "cuda"):
            return f"the tensors are on {tensor.device}"
    if name == CUDA:
        there = tensor.device.type == "cuda"
        reason = _cuda_lack(tensor.device.index if there else None)
        if reason:
            return reason
        if not there:
            return f"the tensors are on {tensor.device}"
    if tensor.dtype not in supported[name]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported[name])
        return f"dtype {str(tensor.dtype).removeprefix('torch.')} is not among {names}"
    return ""
