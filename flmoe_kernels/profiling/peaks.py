"""Peak memory of what is profiled, after a small call of the same kind: loading is no part of it.

The first use of an operator loads code, starts threads and fills tables: tens of MiB of a process that do not
depend on the call's size. `memory.peak_growth` sees them when the measured call is the first of its process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .cases import Case
from .contestants import prepare
from .layers_of_users import UserLayer, make_call
from .memory import memory_lack, peak_bytes, peak_growth
from .shapes import LayerShape, PairShape, Shape, is_cuda

_SMALL = 8
Call = Callable[[], Any]


def at_length(shape: Shape, length: int) -> Shape:
    """The shape at another sequence length: rows and columns of pairs, tokens of every modality (the same share of
    them padded), rows of a routed MLP."""
    name = f"{shape.name}@{length}"
    if isinstance(shape, PairShape):
        return dataclasses.replace(shape, name=name, rows=length, columns=length)
    if isinstance(shape, LayerShape):
        valid = tuple(
            None if count is None else max(1, length * count // tokens)
            for count, tokens in zip(shape.valid, shape.tokens, strict=True)
        )
        return dataclasses.replace(
            shape, name=name, tokens=(length,) * shape.modalities, valid=valid
        )
    return dataclasses.replace(shape, name=name, tokens=length)


def case_peak(case: Case, contestant: str) -> int | None:
    """Bytes that calls take at most beyond inputs and parameters; None where the system does not tell.

    Raises:
        RuntimeError: the process that measures ended early, as one does that runs out of memory.
    """
    if memory_lack(case.device):
        return None
    if is_cuda(case.device):
        return peak_bytes(case, contestant)
    return peak_growth(case_after_small, case, contestant)


def case_after_small(case: Case, contestant: str) -> Call:
    _twice(prepare(dataclasses.replace(case, shape=at_length(case.shape, _SMALL)), contestant).call)
    call = prepare(case, contestant).call
    if contestant.startswith("compiled"):
        call()  # a compiler's memory is not the call's
    return call


def user_peak(user: UserLayer, contestant: str, what: str) -> int | None:
    """The same of a user's layer; what: see `layers_of_users.make_call`.

    Raises:
        RuntimeError: see case_peak.
    """
    if memory_lack(user.device):
        return None
    if not is_cuda(user.device):
        return peak_growth(user_after_small, user, contestant, what)
    call = make_call(user, contestant, what)
    call()
    torch.cuda.synchronize(user.device)
    before = torch.cuda.memory_allocated(user.device)
    torch.cuda.reset_peak_memory_stats(user.device)
    call()
    torch.cuda.synchronize(user.device)
    return torch.cuda.max_memory_allocated(user.device) - before


def user_after_small(user: UserLayer, contestant: str, what: str) -> Call:
    # Of one sample: learned positions fix the tokens.
    _twice(make_call(dataclasses.replace(user, batch=1), contestant, what))
    return make_call(user, contestant, what)


def _twice(call: Call) -> None:
    call()
    call()
