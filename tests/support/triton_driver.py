"""Compiled Triton kernels without a GPU: the binary of a kernel is its PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton

from flmoe_kernels.core.triton import plans
from flmoe_kernels.core.triton.launches import interpreted
from flmoe_kernels.core.triton.recording import Driver, active
from flmoe_kernels.core.triton.target import Target


def _ptx_is_the_binary(
    _backend: Any = None, stages: Any = None, *_: Any, **__: Any
) -> tuple[str, str] | None:
    """Compiler hook: without arguments it returns a part of the cache key, else it makes the PTX the binary."""
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda ptx, _metadata: ptx.encode()
    return None


@contextmanager
def compiled_to_ptx(
    architecture: int, load: Callable[[str], Any], launch: Callable[..., None], device: int | None
) -> Iterator[None]:
    """Within the `with` block the backend "triton" takes CPU tensors; see `recording.Driver`.

    Persistent kernels run few programs, so that each has several tiles.
    """
    if interpreted():
        pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", _ptx_is_the_binary)
        patch.setattr(plans, "_plans", {})
        target = Target(architecture, multiprocessors=2)
        with active(Driver(target, lambda ptx: load(ptx.decode()), launch, device)):
            yield
