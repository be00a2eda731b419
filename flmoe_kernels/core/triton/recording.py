"""Triton without a GPU: a driver, and kernels that are recorded instead of compiled and launched."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launches import Launch, gpu_target, hash_callees_first, interpreted
from .target import Architecture, Target, assume, most_shared

_devices = itertools.count(1000)


class Driver:
    """Minimal driver for Triton.

    Args:
        target: the GPU that kernels are compiled for.
        load: receives the binary of a kernel; its result is the kernel's handle.
        launch: receives Triton's source and metadata of the kernel, the numbers of programs, the handle and the
            arguments.
        device: Triton keeps loaded kernels by this number, so drivers that load differently need their own;
            default: a new one.
    """

    def __init__(
        self,
        target: Target,
        load: Callable[[bytes], Any] = bytes,
        launch: Callable[..., None] = lambda *_: None,
        device: int | None = None,
    ) -> None:
        self.target, self.load, self.launch = target, load, launch
        self.device = next(_devices) if device is None else device
        self.utils = self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return gpu_target(self.target.architecture)

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": most_shared(self.target.architecture)}

    def load_binary(self, _name: str, binary: bytes, _shared: int, _device: int) -> tuple[Any, ...]:
        return None, self.load(binary), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return partial(_launch, source, metadata)


def _launch(source: Any, metadata: Any, *rest: Any) -> None:
    x, y, z, _stream, kernel, _packed, _launch_metadata, _enter, _exit, *arguments = rest
    # Triton caches launchers across drivers, so the active driver is looked up at every launch.
    triton.runtime.driver.active.launch(source, metadata, (x, y, z), kernel, arguments)


@contextmanager
def active(driver: Driver) -> Iterator[None]:
    """Within the `with` block the backend "triton" takes CPU tensors, which stand for those of the driver's GPU.

    Raises:
        RuntimeError: kernels run in Triton's interpreter in this process.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1: kernels are not compiled in this process")
    configuration = vars(triton.runtime.driver)
    # Read without creating the default driver, which needs a GPU; the name depends on the release of Triton.
    name = "_active" if "_active" in configuration else "active"
    before, configuration[name] = configuration[name], driver
    try:
        with assume(driver.target):
            yield
    finally:
        configuration[name] = before


@dataclass(frozen=True)
class Kernel:
    """Key of a kernel's compilation: its signature, constants, attributes of arguments, and options."""

    module: str
    name: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Any, Any], ...]
    attributes: tuple[tuple[Any, Any], ...]
    options: tuple[tuple[str, Any], ...]

    def compile(self, architecture: Architecture) -> bool:
        """Compile it, or find it in Triton's cache; return whether it was found. Needs no GPU."""
        function = getattr(importlib.import_module(self.module), self.name)
        hash_callees_first(function)
        attributes = {key: [list(pair) for pair in value] for key, value in self.attributes}
        source = ASTSource(function, dict(self.signature), dict(self.constants), attributes)
        found: list[bool] = []
        triton.knobs.compilation.listener = lambda cache_hit, **_: found.append(cache_hit)
        try:
            compiled = triton.compile(
                source, target=gpu_target(architecture), options=dict(self.options)
            )
        finally:
            triton.knobs.compilation.listener = None
        if torch.cuda.is_available():
            # Some releases of Triton compile a launcher in C for each signature.
            triton.runtime.driver.active.launcher_cls(source, compiled.metadata)
        return found == [True]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@contextmanager
def recorded(target: Target) -> Iterator[dict[Kernel, None]]:
    """Within the `with` block, launches of kernels for CPU tensors are recorded in order and compute nothing.

    Triton's own launch computes what a kernel is compiled for, so that a launch on the GPU finds the same kernel.

    Yields:
        The kernels of the launches so far.
    """
    kernels: dict[Kernel, None] = {}

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        kernel = Kernel(
            fn.module,
            fn.name,
            tuple(compile["signature"].items()),
            tuple(compile["constants"].items()),
            tuple((key, _tuples(value)) for key, value in compile["configs"][0].items()),
            tuple((key, _tuples(value)) for key, value in options.items()),
        )
        kernels[kernel] = None
        return True  # neither compile nor launch

    hooks, run = triton.knobs.runtime, Launch.run
    before = hooks.jit_cache_hook

    def run_nothing(launch: Launch) -> None:
        run(launch)
        # Results may be indices of torch's operators, which check them on a CPU.
        for value in tree_leaves(launch.arguments):
            if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64):
                value.data.zero_()  # which autograd does not take for a change of its inputs

    try:
        hooks.jit_cache_hook, Launch.run = record, run_nothing  # type: ignore[method-assign, assignment]
        with active(Driver(target)):
            yield kernels
    finally:
        hooks.jit_cache_hook, Launch.run = before, run  # type: ignore[method-assign]
