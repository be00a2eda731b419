"""Kernel launches that can be run or compiled ahead of time.

A launch holds exactly the arguments of its kernel. A kernel compiled without a GPU, from tensors on the meta
device, is therefore the kernel that runs on a GPU.

Kernels name their sizes (numbers of rows, samples, tokens, blocks) in do_not_specialize, so that no kernel is
compiled again for another batch size or length. Widths are constants. Strides and pointers are specialized,
because wide loads need their alignment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import jit

from .tables import architecture_of
from .target import Architecture, assumed

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Without a GPU: few, because the interpreter runs programs one after another.
_MULTIPROCESSORS = 2
# The first architecture of NVIDIA with TF32.
_TF32 = 80
# Triton uses AMD's buffer instructions for storages of up to so many bytes.
_BUFFER_BYTES = 2**31 - 1
_RECORDED: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@dataclass(frozen=True, eq=False)
class Range:
    """Launches of one range of torch's profiler."""

    name: str


@dataclass(frozen=True)
class Launch:
    """A kernel, the number of its programs, and all of its arguments by name.

    registers: maximum number per thread, by architecture of NVIDIA; for other architectures the compiler chooses.
    range: see recorded_range.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: Mapping[int, int] = field(default_factory=dict)
    range: Range | None = None

    def run(self) -> Any:
        """Launch on the current stream; returns Triton's compiled kernel, None in the interpreter."""
        if getattr(self.kernel, "hash", "interpreted") is None:
            hash_callees_first(self.kernel)
        options = self._options(_current_architecture() if self.registers else 0)
        return self.kernel[(self.programs,)](**self.arguments, **self.constants, **options)

    def compile(self, architecture: Architecture) -> Any:
        """Triton's compiled kernel for an architecture, with the text of every stage in `asm`.

        Needs no GPU, but fails in a process that interprets kernels.
        """
        hash_callees_first(self.kernel)
        return triton.compile(
            ASTSource(self.kernel, *self._specialization(isinstance(architecture, str))),
            target=gpu_target(architecture),
            options=self._options(architecture),
        )

    def _specialization(self, amd: bool = False) -> tuple[dict, dict, dict]:
        """Signature, constants and attributes of the kernel."""
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[tuple[int, ...], list] = {}
        for place, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name], constants[name] = "constexpr", self.constants[name]
            else:
                value, plain = self.arguments[name], self.kernel.params[place].do_not_specialize
                signature[name] = _specialize(value, plain, (place,), constants, attributes, amd)
        return signature, constants, attributes

    def _options(self, architecture: Architecture) -> dict[str, Any]:
        # The error budgets assume fused multiply-adds, so do not rely on Triton's default.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if isinstance(architecture, int) and architecture in self.registers:
            options["maxnreg"] = self.registers[architecture]
        return options


def hash_callees_first(function: Any) -> None:
    """Compute Triton's hash of a function after those of the functions that it calls.

    The hash is a part of the key of Triton's cache. It includes constants of a called function only if that was
    hashed before. Without an order, a kernel would have other keys in processes that ran other kernels before.
    """
    names, known = function.fn.__code__.co_names, function.fn.__globals__
    values = [known[name] for name in names if name in known]
    modules = [value for value in values if isinstance(value, ModuleType)]
    values += [getattr(module, name, None) for module in modules for name in names]
    for value in values:
        if isinstance(value, jit.JITFunction) and value is not function and value.hash is None:
            hash_callees_first(value)
    function.cache_key  # noqa: B018  a property that stores the hash


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run launches in order on the current stream of `device`, which need not be the current device."""
    recorded = _RECORDED.get()
    if recorded is not None:
        recorded += [launch for launch in launches if launch.programs]
        return
    with current(device):
        for launch in launches:
            if launch.programs:
                launch.run()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within the `with` block, a GPU is the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within the `with` block, launches are added to a list and not run."""
    launches: list[Launch] = []
    token = _RECORDED.set(launches)
    try:
        yield launches
    finally:
        _RECORDED.reset(token)


@contextmanager
def recorded_range(name: str) -> Iterator[None]:
    """Launches recorded within the `with` block are one range of torch's profiler."""
    recorded = _RECORDED.get()
    assert recorded is not None
    begin, own = len(recorded), Range(name)
    yield
    recorded[begin:] = [replace(launch, range=own) for launch in recorded[begin:]]


def recording() -> bool:
    return _RECORDED.get() is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def multiprocessors(device: torch.device) -> int:
    """Number of a GPU's multiprocessors; persistent kernels run a fixed number of programs on each."""
    if device.type != "cuda":
        target = assumed()
        return _MULTIPROCESSORS if target is None else target.multiprocessors
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def gpu_target(architecture: Architecture) -> GPUTarget:
    """Triton's name of an architecture."""
    if isinstance(architecture, int):
        return GPUTarget("cuda", architecture, 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


def _current_architecture() -> Architecture:
    """Architecture of the current GPU, or of the assumed one; 0 in the interpreter."""
    if interpreted():
        return 0
    return architecture_of(torch.device("cpu")) or architecture_of(torch.device("cuda")) or 0


def compiles_to_ptx(device: torch.device) -> bool:
    """Whether kernels may use inline assembly of NVIDIA's GPUs."""
    return not interpreted() and not isinstance(architecture_of(device), str)


def matrix_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Precision of float32 products in a call of this dtype, for `products.dot`.

    Three TF32 products, which are close to float32, or a single one if torch allows TF32. On AMD and before sm_80:
    float32 itself.
    """
    architecture = architecture_of(device)
    if isinstance(architecture, str) or (architecture or _TF32) < _TF32:
        return "ieee"
    settings = torch.backends.cuda.matmul
    # Since torch 2.9, reading allow_tf32 may raise.
    fast = getattr(settings, "fp32_precision", None) or ("tf32" if settings.allow_tf32 else "ieee")
    return "tf32" if fast == "tf32" and dtype == torch.float32 else "tf32x3"


def _specialize(
    value: Any, plain: bool, path: tuple[int, ...], constants: dict, attributes: dict, amd: bool
) -> Any:
    """The signature of one argument by the rules of a launch: None becomes a constant and, unless the argument is
    `plain` (do_not_specialize), so does 1, and pointers and multiples of 16 are marked as aligned."""
    if isinstance(value, tuple):
        parts = [
            _specialize(part, plain, (*path, i), constants, attributes, amd)
            for i, part in enumerate(value)
        ]
        return tuple(parts)
    if value is None or (isinstance(value, int) and value == 1 and not plain):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if not plain and (isinstance(value, Tensor) or value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        if amd and not plain and value.untyped_storage().size() <= _BUFFER_BYTES:
            attributes[path].append(["tt.pointer_range", 32])
        return _TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"
