"""What every Triton backend needs: launches as values, which run, or compile ahead of time for a report.

A launch holds exactly what its kernel gets. So what a static check compiles for a GPU that is not there, from
tensors on the meta device, is what runs where it is.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Where there is no GPU to ask: few, since the interpreter runs programs one by one.
_MULTIPROCESSORS: ContextVar[int] = ContextVar("multiprocessors", default=2)
_MATRIX_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[a-zA-Z]\w*::\w+)*(?:\.v(\d))?\.[a-z](\d+)\b")


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel: per thread registers and spilled bytes, per block shared bytes.

    matrix: the matrix instructions of the PTX by name. warps: of a block, with those that the compiler added.
    tensor_memory: columns, of the 512 that an SM of sm_100 has; 0 elsewhere. accesses: loads and stores of global
    memory in the PTX by the bytes that a thread moves with each, "ld.16" or "st.4".
    """

    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    warps: int
    tensor_memory: int
    accesses: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """A kernel, the number of its programs, and all of its arguments by name.

    registers: the most that a thread may have, by architecture; for others it is the compiler's choice.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: Mapping[int, int] = field(default_factory=dict)

    def run(self) -> None:
        options = self._options(_architecture() if self.registers else 0)
        self.kernel[(self.programs,)](**self.arguments, **self.constants, **options)

    def compile(self, architecture: int) -> Report:
        """Compile for sm_`architecture`; needs no GPU, but real kernels, not those of the interpreter."""
        return _report(self.compiled(architecture))

    def compiled(self, architecture: int) -> Any:
        """What Triton makes of it, with the text of every stage in `asm`."""
        return triton.compile(
            ASTSource(self.kernel, *self._specialization()),
            target=GPUTarget("cuda", architecture, 32),
            options=self._options(architecture),
        )

    def specialization(self, architecture: int) -> str:
        """Equal for launches that run the same compiled kernel, whatever their shapes are."""
        kernel = f"{self.kernel.fn.__module__}.{self.kernel.fn.__name__}"
        facts = (kernel, architecture, *self._specialization(), self._options(architecture))
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _specialization(self) -> tuple[dict, dict, dict]:
        """Signature, constants and attributes of the kernel."""
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[tuple[int, ...], list] = {}
        for place, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name], constants[name] = "constexpr", self.constants[name]
            else:
                value = self.arguments[name]
                signature[name] = _specialize(value, (place,), constants, attributes)
        return signature, constants, attributes

    def _options(self, architecture: int) -> dict[str, Any]:
        # Fused multiply-adds are what the error budgets are met with; their default is about to change.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if architecture in self.registers:
            options["maxnreg"] = self.registers[architecture]
        return options


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run launches in order on the current stream of `device`, which need not be the current device."""
    if device.type == "cpu":
        _run(launches)
    else:
        with torch.cuda.device(device):
            _run(launches)


def _run(launches: Iterable[Launch]) -> None:
    for launch in launches:
        if launch.programs:
            launch.run()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has: persistent kernels run a fixed number of programs on each."""
    if device.type != "cuda":
        return _MULTIPROCESSORS.get()
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@contextmanager
def assume_multiprocessors(count: int) -> Iterator[None]:
    """Within: launches of tensors that are on no GPU are those for one with so many multiprocessors."""
    token = _MULTIPROCESSORS.set(count)
    try:
        yield
    finally:
        _MULTIPROCESSORS.reset(token)


def _architecture() -> int:
    """The current GPU's, 90 for sm_90; 0 in the interpreter."""
    return 0 if interpreted() else _capability(torch.cuda.current_device())


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def matrix_precision(dtype: torch.dtype) -> str:
    """float32 products: three TF32 ones, which are near float32, or one where torch's own may be that."""
    settings = torch.backends.cuda.matmul
    # From torch 2.9 on reading allow_tf32 may raise.
    fast = getattr(settings, "fp32_precision", None) or ("tf32" if settings.allow_tf32 else "ieee")
    return "tf32" if fast == "tf32" and dtype == torch.float32 else "tf32x3"


def expect(
    name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Fail unless x, if given, is what a kernel will read: a call of a registered operator that did not come
    through the package's doors must not become a read past a tensor's end."""
    if x is None:
        return
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)} on {device}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def _specialize(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """The signature of one argument under the rules of a launch: 1 and None become constants, and
    pointers and multiples of 16 are known to be aligned."""
    if isinstance(value, tuple):
        parts = [
            _specialize(part, (*path, i), constants, attributes) for i, part in enumerate(value)
        ]
        return tuple(parts)
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _report(compiled: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    accesses = (
        f"{kind}.{int(many or 1) * int(bits) // 8}" for kind, many, bits in _ACCESS.findall(ptx)
    )
    metadata = compiled.metadata
    return Report(
        resources["REG"],
        resources["STACK"] + resources["LOCAL"],
        metadata.shared,
        dict(Counter(_MATRIX_INSTRUCTION.findall(ptx))),
        metadata.num_warps,
        getattr(metadata, "tmem_size", None) or 0,
        dict(Counter(accesses)),
    )
