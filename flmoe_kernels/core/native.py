"""What every call into the native CPU module needs: addresses, dtype codes, output buffers, threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .backend import native

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_HUGE_BYTES = 4 << 20


def dtype_code(x: Tensor) -> int:
    return _CODES[x.dtype]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def threads() -> int:
    return torch.get_num_threads()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor; large ones ask for huge pages, whose faults are ten times cheaper."""
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    size = out.numel() * out.element_size()
    if size >= _HUGE_BYTES:
        native().advise_huge(out.data_ptr(), size)
    return out


def expect(name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Fail unless x, if given, is what a kernel will read: this shape and dtype, in host memory.

    The kernels read through plain addresses; a call of a registered operator that did not come through the
    package's doors must not become a read past a tensor's end.
    """
    if x is None:
        return
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device.type != "cpu":
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)} on cpu, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def expect_run_lengths(name: str, x: Tensor) -> None:
    expect(name, x, (max(x.numel(), 1),), torch.int32)


def expect_seed(seed: Tensor | None) -> None:
    if seed is not None:
        expect("seed", seed.reshape(-1), (1,), torch.int64)


def first_order_only(op: str, times: str = "differentiable once") -> None:
    """Make a derivative through an operator that has none an error instead of a silent zero."""

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"{op} has no derivative: the kernels are {times}; "
            "backend='reference' is differentiable any number of times"
        )

    torch.library.register_autograd(op, refuse, setup_context=setup)
