"""Backends: availability, supported dtypes, and choice for a call.

A backend is requested with `backend=` on a call, with `use_backend(...)` around it, or with the environment
variable FLMOE_BACKEND (read at import). If a requested backend cannot run, an error gives the reason; there is no
fallback. By default, CUDA tensors use the GPU backends and CPU tensors the C++ kernels.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .dtypes import FLOATS, HALVES_AND_FLOAT32, dtype_name
from .native import BackendUnavailable as BackendUnavailable
from .native import cpu_unavailable_reason, cuda_status, cuda_unavailable_reason
from .native import instruction_set as instruction_set
from .native import instruction_sets as instruction_sets
from .native import native as native
from .settings import ScopedSetting

REFERENCE, CPU, TRITON, CUDA = "reference", "cpu", "triton", "cuda"
BACKENDS = (REFERENCE, CPU, TRITON, CUDA)

# operator -> backend -> dtypes. A backend without kernels for an operator has no row.
CAPABILITIES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    op: {REFERENCE: FLOATS, CPU: FLOATS, TRITON: HALVES_AND_FLOAT32}
    for op in ("expert_attention", "interaction_moe", "pair_moe", "routing", "routed_mlp")
}
CAPABILITIES["routing"][CUDA] = FLOATS

# Default backends for CUDA tensors, best first; the first backend that can run is used.
_ON_CUDA = (CUDA, TRITON)


def backend_status() -> dict[str, tuple[bool, str]]:
    """For every backend, whether it can run on this machine, and its details or the reason."""
    reason = cpu_unavailable_reason()
    pool = "" if reason else f"{instruction_set()}, {native().parallel_pool()} pool"
    return {
        REFERENCE: (True, f"PyTorch {torch.__version__}"),
        CPU: (not reason, reason or pool),
        TRITON: _triton_status(),
        CUDA: cuda_status(),
    }


def _triton_status() -> tuple[bool, str]:
    """Status of Triton, checked on every call without importing it, which takes seconds."""
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if _interpreted():
        return True, "Triton's interpreter, slowly, on CPU tensors (TRITON_INTERPRET=1)"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False, "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return True, f"CUDA {torch.version.cuda}"


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
_requested: ScopedSetting[str | None] = ScopedSetting(_environment)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use this backend for all calls within the `with` block, in any thread, that do not pass `backend`."""
    with _requested.override(_known(name, "use_backend")):
        yield


def choose(op: str, tensor: torch.Tensor, backend: str | None = None) -> str:
    """The backend for one call of `op` on tensors like `tensor`.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailable: the chosen backend cannot run this; names the operator, backend and reason.
    """
    explicit = _requested.get() if backend is None else backend
    if explicit is not None:
        name = _known(explicit, "backend")
    elif tensor.device.type == "cpu" and (
        not cpu_unavailable_reason() or os.environ.get("FLMOE_ISA")
    ):
        # FLMOE_ISA requests the CPU kernels: an instruction set that cannot run is an error, not a fallback.
        name = CPU
    elif tensor.device.type == "meta":
        name = CPU  # needs no values, unlike some references
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
        raise BackendUnavailable(f"{op}: backend {name!r} was requested, but {reason}")
    return name


def _refusal(op: str, name: str, tensor: torch.Tensor) -> str:
    """The reason why a backend cannot run this, or ""."""
    supported, kind = CAPABILITIES[op], tensor.device.type
    if name not in supported:
        return f"this operator has no {name} kernels in this version"
    reason, expected = "", kind
    match name if kind != "meta" else "":  # there nothing runs: operators infer shapes and dtypes
        case "cpu":
            reason, expected = cpu_unavailable_reason(), "cpu"
        case "triton":
            runs, status = _triton_status()
            reason, expected = "" if runs else status, "cpu" if _interpreted() else "cuda"
        case "cuda":
            reason = cuda_unavailable_reason(tensor.device.index if kind == "cuda" else None)
            expected = "cuda"
    if reason:
        return reason
    if kind != expected:
        return f"the tensors are on {tensor.device}"
    if tensor.dtype not in supported[name]:
        names = ", ".join(map(dtype_name, supported[name]))
        return f"dtype {dtype_name(tensor.dtype)} is not among {names}"
    return ""
