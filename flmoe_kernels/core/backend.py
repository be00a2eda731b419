"""Backends: availability, supported dtypes, and choice for a call.

A backend is requested with `backend=` on a call, with `use_backend(...)` around it, or with the environment
variable FLMOE_BACKEND (read at import). If a requested backend cannot run, an error gives the reason; there is no
fallback. By default, CUDA tensors use the GPU backends that pass their self-check and CPU tensors the C++ kernels;
transforms of torch.func and forward-mode AD, which the kernels do not support, use the reference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad

from . import self_check
from .dtypes import FLOATS, HALVES_AND_FLOAT32, dtype_name
from .native import BackendUnavailable as BackendUnavailable
from .native import (
    constant_in_traces,
    cpu_unavailable_reason,
    cuda_status,
    cuda_unavailable_reason,
)
from .native import instruction_set as instruction_set
from .native import instruction_sets as instruction_sets
from .native import native as native
from .self_check import BackendWarning as BackendWarning
from .settings import environment_choice
from .triton.release import unsuitable_reason
from .triton.target import assumed

REFERENCE, CPU, TRITON, CUDA = "reference", "cpu", "triton", "cuda"
BACKENDS = (REFERENCE, CPU, TRITON, CUDA)

# operator -> backend -> dtypes. A backend without kernels for an operator has no row.
CAPABILITIES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    op: {REFERENCE: FLOATS, CPU: FLOATS, TRITON: HALVES_AND_FLOAT32}
    for op in ("expert_attention", "interaction_moe", "pair_moe", "routing", "routed_mlp")
}
CAPABILITIES["routing"][CUDA] = CAPABILITIES["pair_moe"][CUDA] = FLOATS

# Default backends for CUDA tensors, best first; the first backend that can run is used.
_ON_CUDA = (CUDA, TRITON)
# Not used unless requested: not measured against Triton's kernels.
_ON_REQUEST = {("pair_moe", CUDA)}
# On AMD, Triton's kernels are not used unless requested either: a memory fault ends the process there, so a
# self-check could not report it.
_AMD = "it compiles for AMD GPUs, but was never run on one"


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
    if reason := unsuitable_reason():
        return False, reason
    if _interpreted():
        return True, "Triton's interpreter, slowly, on CPU tensors (TRITON_INTERPRET=1)"
    if target := assumed():
        return True, f"CPU tensors stand for those of {target}"
    if not (torch.version.cuda or torch.version.hip) or not torch.cuda.is_available():
        return False, "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    if torch.version.hip:
        return True, f"ROCm {torch.version.hip}, only on request: {_AMD}"
    return True, f"CUDA {torch.version.cuda}"


@constant_in_traces
def _triton_unavailable_reason() -> str:
    runs, status = _triton_status()
    return "" if runs else status


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    return tuple(name for name, (ok, _) in backend_status().items() if ok)


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_environment = environment_choice("FLMOE_BACKEND", BACKENDS)


class _Request:
    """The request of one `use_backend` block, compared by identity."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        # Whether the block was left in another thread than it was entered in, by a generator given to that thread.
        self.left_elsewhere = False


class _Requests:
    """The requests of the open `use_backend` blocks of this thread or asyncio task."""

    # The innermost request is the last one. Without an open block the value is this object: a variable that was
    # never set returns the argument of `get`, and torch.compile should see the same value after a block.
    _variable: ContextVar[tuple[_Request, ...] | _Requests] = ContextVar("use_backend")
    # torch.compile cannot trace a ContextVar. A property whose getter is a builtin is not traced either: its value
    # is read and guarded.
    _value = property(_variable.get)

    def __init__(self) -> None:
        # The blocks of a function while it is traced; empty during normal execution.
        self._traced: list[_Request] = []

    def innermost(self) -> str | None:
        if torch.compiler.is_dynamo_compiling() and self._traced:
            return self._traced[-1].backend
        requests = self._open()
        return requests[-1].backend if requests else None

    def enter(self, request: _Request) -> None:
        if torch.compiler.is_dynamo_compiling():
            self._traced.append(request)
        else:
            self._variable.set((*self._open(), request))

    def leave(self, request: _Request) -> None:
        # Remove this request, not the last one: the blocks of two generators may overlap.
        if torch.compiler.is_dynamo_compiling():
            self._traced.remove(request)
        elif request in self._open():
            self._variable.set(tuple(x for x in self._open() if x is not request) or self)
        else:
            request.left_elsewhere = True

    def _open(self) -> tuple[_Request, ...]:
        requests = self._value
        if not isinstance(requests, tuple):
            return ()
        return tuple(request for request in requests if not request.left_elsewhere)


_requests = _Requests()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use this backend for all calls within the `with` block that do not pass `backend`.

    The choice belongs to the thread or asyncio task that enters the block, and to the tasks that it starts there.
    A new thread starts without it; contextvars.copy_context().run passes it on. A backward pass uses the backend
    of its forward pass, wherever it runs. Compiled code is compiled again when it is called with another choice.
    """
    request = _Request(_known(name, "use_backend"))
    _requests.enter(request)
    try:
        yield
    finally:
        _requests.leave(request)


# torch.compile guards the transforms that were active when it traced, and the wrappers of transformed tensors.
@constant_in_traces
def transforms_active() -> bool:
    """Whether the call runs in a torch.func transform (grad, vmap, jvp, ...)."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def transforming() -> bool:
    """Whether the call runs in a torch.func transform or while a level of forward-mode AD is open."""
    return transforms_active() or forward_ad._current_level >= 0


def requested(backend: str | None = None) -> str | None:
    """The backend that a call, a `use_backend` block or the environment requests, in this order; else None."""
    return (_requests.innermost() or _environment) if backend is None else backend


def choose(op: str, tensor: torch.Tensor, backend: str | None = None) -> str:
    """The backend for one call of `op` on tensors like `tensor`.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailable: the chosen backend cannot run this; names the operator, backend and reason.
    """
    explicit = requested(backend)
    if explicit is not None:
        name = _known(explicit, "backend")
    elif transforming():
        name = REFERENCE
    elif tensor.device.type == "cpu" and (
        not cpu_unavailable_reason() or os.environ.get("FLMOE_ISA")
    ):
        # FLMOE_ISA requests the CPU kernels: an instruction set that cannot run is an error, not a fallback.
        name = CPU
    elif tensor.device.type == "meta":
        name = CPU  # needs no values, unlike some references
    elif tensor.device.type == "cuda":
        return _choose_on_cuda(op, tensor)
    else:
        name = REFERENCE
    reason = _refusal(op, name, tensor)
    if reason:
        if explicit is None:
            raise BackendUnavailable(f"{op}: {reason}")
        raise BackendUnavailable(f"{op}: backend {name!r} was requested, but {reason}")
    return name


def _choose_on_cuda(op: str, tensor: torch.Tensor) -> str:
    reasons = []
    for name in _ON_CUDA:
        if name not in CAPABILITIES[op] or (op, name) in _ON_REQUEST:
            continue
        reason = _refusal(op, name, tensor)
        if not reason and torch.version.hip:
            reason = f"{_AMD}; backend={name!r} uses it anyway"
        if reason:
            reasons.append(f"{name}: {reason}")
        elif not self_check.failure(op, name, tensor):
            return name
    if reasons:  # a failed self-check has its own warning
        why = "; ".join(reasons)
        message = f"{op}: the reference, which is slower, computes CUDA tensors, because {why}"
        if (op, CUDA) in _ON_REQUEST and not _refusal(op, CUDA, tensor):
            message += "; backend='cuda' can compute them"
        self_check.warn_once(why, message)
    return REFERENCE


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
            stand_in = _interpreted() or assumed() is not None
            reason, expected = _triton_unavailable_reason(), "cpu" if stand_in else "cuda"
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
    # Forward-mode AD is refused by the kernels, which see all tensors: its levels belong to the process, and only
    # tensors with a tangent take part.
    if name != REFERENCE and transforms_active():
        return "its kernels do not support torch.func transforms; backend='reference' does"
    return ""
