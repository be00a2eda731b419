"""The native module: loading, availability, helpers for calling CPU kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import blocks
from .settings import environment_choice

Function = TypeVar("Function", bound=Callable[..., Any])

_HUGE_BYTES = 4 << 20
_INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline")  # best first


class BackendUnavailable(RuntimeError):
    """A requested backend cannot run this call; the message gives the reason."""


def _load() -> tuple[ModuleType | None, str]:
    requested = environment_choice("FLMOE_ISA", _INSTRUCTION_SETS)
    # After torch: the native module shares the OpenMP pool that torch has loaded.
    try:
        module = importlib.import_module("flmoe_kernels._native")
    except ImportError as error:
        return None, f"the native module is not built or cannot be loaded ({error})"
    if requested is not None and not module.instruction_set_runs(requested):
        supported = ", ".join(filter(module.instruction_set_runs, _INSTRUCTION_SETS))
        return None, (
            f"FLMOE_ISA: this processor does not support {requested}, expected one of {supported}"
        )
    module.instruction_set()  # the native module reads FLMOE_ISA at the first use
    return module, ""


_module, _reason = _load()


def cpu_unavailable_reason() -> str:
    """The reason why the CPU kernels cannot run, or ""."""
    return _reason if _module is None else ""


def native() -> ModuleType:
    """The native module; BackendUnavailable if it was not built."""
    if _module is None:
        raise BackendUnavailable(f"backend 'cpu': {_reason}")
    return _module


def native_cuda() -> ModuleType:
    """The native module if it was built with CUDA, on any machine; otherwise raises BackendUnavailable."""
    reason = _unbuilt_cuda_reason()
    if reason:
        raise BackendUnavailable(f"backend 'cuda': {reason}")
    return native()


@contextmanager
def cuda_queue(device: torch.device) -> Iterator[tuple[int, int]]:
    """Device and current stream, for a launch; the native module changes the current device, which is restored."""
    with torch.cuda.device(device):
        yield device.index, torch.cuda.current_stream(device).cuda_stream


def instruction_set() -> str:
    """The instruction set of the CPU kernels ("avx512bf16", "avx512", "avx2", "baseline"), or "none"."""
    return "none" if _module is None else str(_module.instruction_set())


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this processor supports, best first; FLMOE_ISA selects one."""
    if _module is None:
        return ()
    runs = _module.instruction_set_runs
    return tuple(filter(runs, _INSTRUCTION_SETS))


def cuda_status() -> tuple[bool, str]:
    """Whether the CUDA kernels can run on a device, and the details; read from attributes, without a context."""
    reason = _unbuilt_cuda_reason()
    if reason:
        return False, reason
    architectures = native().cuda_build()[0]
    reason = cuda_unavailable_reason()
    if reason:
        return False, f"{reason}; kernels were built, for {architectures}"
    reasons = [cuda_unavailable_reason(device) for device in range(native().cuda_devices()[0])]
    if all(reasons):
        return False, reasons[0]
    return (
        True,
        f"kernels for {architectures}, built with CUDA {_version(native().cuda_versions()[0])}",
    )


def _unbuilt_cuda_reason() -> str:
    if _module is None:
        return _reason
    architectures, reason = _module.cuda_build()
    return "" if architectures else f"the native module was built without CUDA ({reason})"


def constant_in_traces(function: Function) -> Function:
    """Mark a function so that torch.compile does not trace it but treats its result as a constant."""
    # The same as torch.compiler.assume_constant_result, which imports the compiler and takes seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_traces
def cuda_unavailable_reason(device: int | None = None) -> str:
    """The reason why the CUDA kernels cannot run on this device (None: on any device); "" if they can."""
    reason = _unbuilt_cuda_reason()
    if reason:
        return reason
    module = native()
    compiler, driver = module.cuda_versions()
    if (
        0 < driver // 1000 < compiler // 1000
    ):  # a driver runs code of later compilers of its major version
        return (
            f"the driver, for CUDA {_version(driver)}, is too old: the kernels were built with CUDA "
            f"{_version(compiler)} and need a driver for CUDA {compiler // 1000}.0 or newer"
        )
    devices, reason = module.cuda_devices()
    torch_has_one = torch.version.cuda is not None and torch.cuda.is_available()
    if not devices:
        return f"there is no CUDA device ({reason or 'none is visible'})"
    if not torch_has_one:
        return f"torch {torch.__version__} has no CUDA device"
    return "" if device is None else _device_reason(module, device)


def _version(number: int) -> str:
    """A version as CUDA numbers it: "12.8" for 12080."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _device_reason(module: ModuleType, device: int) -> str:
    """The reason for one device; not cached, because it may change, and a probe only reads a table."""
    major, minor, message = module.cuda_probe(device)
    if not message:
        return ""
    name = f"cuda:{device} is sm_{major}{minor}" if major else f"cuda:{device} does not answer"
    return f"{name}, the kernels are for {module.cuda_build()[0]} ({message})"


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def threads() -> int:
    return torch.get_num_threads()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous CPU tensor; a large tensor takes the memory of a freed one, or huge pages, whose
    faults are ten times cheaper."""
    out, new = blocks.empty(shape, dtype or like.dtype)
    if new and out.nbytes >= _HUGE_BYTES:
        native().advise_huge(out.data_ptr(), out.nbytes)
    return out
