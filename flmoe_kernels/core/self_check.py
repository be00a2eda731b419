"""Self-check of GPU kernels before the automatic choice first uses them.

Results are kept for the process, and in a file for later processes. `profile.first_use` compares the results.
"""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from flmoe_kernels._version import __version__

from .dtypes import dtype_name
from .files import write_whole
from .native import constant_in_traces
from .settings import environment_choice
from .triton.release import installed
from .triton.tables import architecture_of
from .triton.target import Architecture
from .triton.tuning.timing import capturing

# Pairs (architecture, package version), such as (90, "1.1.0"), that skip the self-check. Add one only when
# bench/results/ has the results of all GPU tests and benchmarks for it.
PROVEN: frozenset[tuple[Architecture | None, str]] = frozenset()

Key = tuple[str, str, torch.dtype, int | None]  # operator, backend, dtype, number of the GPU
# Returns the reason why the kernels must not be used, or ""; raises if they cannot be checked. Runs in a thread of
# its own, in which grad mode, autocast, transforms and modes have their defaults.
Check = Callable[[str, str, torch.dtype, torch.device], str]

_enabled = environment_choice("FLMOE_SELF_CHECK", ("0", "1")) != "0"
_check: Check | None = None
_failures: dict[Key, str] = {}  # "" for kernels that passed
_warned: set[str] = set()
_lock = threading.RLock()


class BackendWarning(UserWarning):
    """Kernels failed their self-check, or the reference computes CUDA tensors."""


def install(check: Check) -> None:
    """Set the check; core itself may not import the reference."""
    global _check
    _check = check


def failure(op: str, backend: str, tensor: torch.Tensor) -> str:
    """The reason why the automatic choice must not use these kernels for tensors like this one, or "".

    Checks at the first call for an operator, backend, dtype and GPU. Where no check can run (torch.compile,
    torch.export, fake tensors, CUDA graph capture, a backward pass), only recorded results count.
    """
    key = (op, backend, tensor.dtype, tensor.device.index)
    reason = _failures.get(key) if _enabled else ""
    if reason is None:
        compiling = torch.compiler.is_compiling()
        reason = _recorded(*key) if compiling else _first_use(key, tensor)
    return reason


@constant_in_traces
def warn_once(reason: str, message: str) -> str:
    """Warn, once per reason and process. Returns ""."""
    with _lock:
        new = reason not in _warned
        _warned.add(reason)
    if new:
        warnings.warn(message, BackendWarning, stacklevel=4)
    return ""


def _first_use(key: Key, tensor: torch.Tensor) -> str:
    from torch._subclasses.fake_tensor import is_fake

    # In a backward pass, the check's own backward would wait for the thread that waits for it.
    backward = torch._C._current_graph_task_id() != -1
    if backward or is_fake(tensor) or capturing(tensor.device):
        return _recorded(*key)
    with _lock:
        if key not in _failures:
            _failures[key] = _judge(*key)
    return _recorded(*key)


def _judge(op: str, backend: str, dtype: torch.dtype, index: int | None) -> str:
    """The recorded result; without one, check and record."""
    device = torch.device("cuda", index or 0)
    if _check is None or (architecture_of(device), __version__) in PROVEN:
        return ""
    environment, name = _environment(index), _name(op, backend, dtype)
    results = _read(environment)
    if name not in results:
        try:
            with ThreadPoolExecutor(1) as thread:
                results[name] = thread.submit(_check, op, backend, dtype, device).result()
        except Exception as error:  # of the reference, of the allocator, of a user's hook
            why = f"{type(error).__name__}: {error}"
            warn_once(why, f"{name}: used without the self-check, which could not run: {why}")
            return ""
        content = {"environment": environment, "results": _read(environment) | results}
        with suppress(OSError, RuntimeError):  # the next process checks again
            write_whole(_file(environment), json.dumps(content, indent=1), make_folder=True)
    return results[name]


@constant_in_traces
def _recorded(op: str, backend: str, dtype: torch.dtype, index: int | None) -> str:
    """The result of this process or of the file, with a warning if the kernels failed; "" if there is none."""
    name, environment = _name(op, backend, dtype), _environment(index)
    reason = _failures.get((op, backend, dtype, index))
    if reason is None:
        reason = _read(environment).get(name, "")
    if reason:
        message = (
            f"{name}: these kernels failed their self-check and are not used: {reason}. Please report this "
            f"line to the maintainers of flmoe_kernels: {environment}. backend={backend!r} uses the kernels "
            "regardless. Later processes do not check again, unless the folder flmoe_kernels/self_check "
            "in ~/.cache or XDG_CACHE_HOME is deleted"
        )
        warn_once(f"{name} {environment}", message)
    return reason


def _name(op: str, backend: str, dtype: torch.dtype) -> str:
    return f"{op} {backend} {dtype_name(dtype)}"


def _environment(index: int | None) -> dict[str, str]:
    """Key of a result."""
    versions = {"flmoe_kernels": __version__, "torch": torch.__version__}
    device = str(torch.cuda.get_device_name(index))
    return {"device": device, **versions, "triton": installed() or "none"}


def _file(environment: dict[str, str]) -> Path:
    """The file of the results; RuntimeError without a home folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^\w.+-]+", "_", "-".join(environment.values()))
    return folder / "flmoe_kernels" / "self_check" / f"{name}.json"


def _read(environment: dict[str, str]) -> dict[str, str]:
    """Recorded results; none if the file is missing, damaged or of another environment."""
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        content = json.loads(_file(environment).read_bytes())
        if content["environment"] == environment:
            return {name: x for name, x in content["results"].items() if isinstance(x, str)}
    return {}
