"""A Triton driver without a GPU: kernels are compiled to PTX, and each launch calls a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from flmoe_kernels.core import backend
from flmoe_kernels.core.triton import launches, plans
from flmoe_kernels.ops.expert_attention.triton import choice as attention
from flmoe_kernels.ops.pair_moe.triton import choice as pairs
from flmoe_kernels.ops.routed_mlp.triton import choice as routed

# Bytes of shared memory that a block may have.
_SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Driver:
    """What Triton needs of a driver.

    Args:
        architecture: 90 for sm_90.
        load: receives the PTX of a kernel; its result is the kernel's handle.
        launch: receives Triton's source and metadata of the kernel, the numbers of programs, the handle and the
            arguments.
        device: Triton keeps loaded kernels by this number, so drivers that load differently need their own.
    """

    def __init__(
        self,
        architecture: int,
        load: Callable[[str], Any],
        launch: Callable[..., None],
        device: int,
    ) -> None:
        self.architecture, self.load, self.launch, self.device = architecture, load, launch, device
        self.utils = self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED[self.architecture]}

    def load_binary(self, _name: str, ptx: bytes, _shared: int, _device: int) -> tuple[Any, ...]:
        return None, self.load(ptx.decode()), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return partial(_launch, source, metadata)


def _launch(source: Any, metadata: Any, *rest: Any) -> None:
    x, y, z, _stream, kernel, _packed, _launch_metadata, _enter, _exit, *arguments = rest
    # Triton caches launchers across drivers, so the active driver is looked up at every launch.
    triton.runtime.driver.active.launch(source, metadata, (x, y, z), kernel, arguments)


def _ptx_is_the_binary(
    _backend: Any = None, stages: Any = None, *_: Any, **__: Any
) -> tuple[str, str] | None:
    """Compiler hook: without arguments it returns a part of the cache key, else it makes the PTX the binary."""
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda ptx, _metadata: ptx.encode()
    return None


@contextmanager
def active(driver: Driver) -> Iterator[None]:
    """Within the `with` block the backend "triton" takes CPU tensors and launches with this driver, with the
    launch tables of its architecture."""
    if launches.interpreted():
        pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", _ptx_is_the_binary)
        patch.setattr(backend, "_interpreted", lambda: True)
        patch.setattr(plans, "_plans", {})

        def architecture_of(_device: torch.device) -> int:
            return driver.architecture

        for module in (launches, attention, pairs, routed):
            patch.setattr(module, "architecture_of", architecture_of)
        yield
