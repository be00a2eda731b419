"""Tensors that are kept between calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Result = TypeVar("Result")


def kept(make: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator for a function of hashable arguments and of a device: keeps its tensors where that is safe.

    They must not be modified. They are not kept in a trace or a torch.func transform, whose tensors must not
    outlive it, and during CUDA graph capture, because a later call may evict the tensor. Each CUDA stream has its
    own tensors, because streams are not ordered: one stream could read a tensor before another has written it, or
    after it was freed.
    """

    @functools.lru_cache(maxsize=16)
    def keep(_stream: int, *args: Any) -> Result:
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False):
            return make(*args)

    @functools.wraps(make)
    def call(*args: Any) -> Result:
        if traced():
            return make(*args)
        stream = 0
        device = next(x for x in args if isinstance(x, torch.device))
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make(*args)
            stream = torch.cuda.current_stream(device).cuda_stream
        return keep(stream, *args)

    return call


def traced() -> bool:
    """Whether a call is traced or transformed."""
    # is_compiling comes first: the compiler can trace only that call.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
    )
