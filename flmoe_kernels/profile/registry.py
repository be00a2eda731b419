"""Contestants of a case: this package's backends and the reference, or a peer with the same interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from flmoe_kernels._version import __version__
from flmoe_kernels.core import backend as backends

from .cases import Case
from .prepared import Prepared
from .shapes import is_cuda

OURS, PEER = "ours", "peer"
_INTERPRETED = "it runs in Triton's interpreter here, whose time is meaningless"
_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Contestant:
    """An implementation of a case.

    Attributes:
        kind: OURS (a backend of this package) or PEER.
        version: of the implementation's package.
        why_not: the reason why it cannot run here or does not compute this case; "" if it can.
        make: (case, name, dtype) -> Prepared; a module-level function, so other processes can import it. Inputs
            are rounded to the case's dtype; the computation is in dtype.
    """

    name: str
    kind: str
    version: str
    why_not: str
    make: Callable[[Case, str, torch.dtype], Prepared]


def contestants(case: Case) -> list[Contestant]:
    """Return this package's backends, then the reference; `why_not` is set if they cannot run here."""
    module = operator_module(case.operator)
    missing = device_unavailable_reason(case.device)
    ours = [
        Contestant(
            name,
            OURS,
            __version__,
            missing or _backend_unavailable_reason(case, name),
            module.prepare,
        )
        for name in backends.CAPABILITIES[case.operator]
        if name != backends.REFERENCE
    ]
    unavailable_reason = getattr(module, "reference_unavailable_reason", lambda case: "")
    why_not = missing or unavailable_reason(case)
    reference = Contestant(backends.REFERENCE, PEER, torch.__version__, why_not, module.prepare)
    return [*ours, reference]


def find(case: Case, name: str) -> Contestant:
    """Find a contestant by name.

    Raises:
        ValueError: no such contestant.
    """
    known = {contestant.name: contestant for contestant in contestants(case)}
    if name not in known:
        raise ValueError(f"{case.name}: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def default_ours(case: Case) -> Contestant:
    """Return the backend that is selected by default.

    Raises:
        BackendUnavailable: none of this package's kernels runs this case here; the message has all reasons.
    """
    ours = [contestant for contestant in contestants(case) if contestant.kind == OURS]
    runs = [contestant for contestant in ours if not contestant.why_not]
    if not runs:
        reasons = "; ".join(f"{contestant.name}: {contestant.why_not}" for contestant in ours)
        raise backends.BackendUnavailable(f"{case.name} on {case.device}: {reasons}")
    # On a GPU the CUDA backend comes first, see backend.choose.
    return next((contestant for contestant in runs if contestant.name == backends.CUDA), runs[0])


def prepare(case: Case, contestant: Contestant | str, dtype: torch.dtype | None = None) -> Prepared:
    """Make the inputs, which are the same for every contestant, and the call.

    Args:
        contestant: a contestant, or the name of a backend or the reference.
        dtype: of the computation, for an exact result; inputs are rounded to the case's dtype. None: the case's.

    Raises:
        ValueError: no such contestant.
        BackendUnavailable: the contestant is known not to run this case here.
    """
    if isinstance(contestant, str):
        contestant = find(case, contestant)
    reason = contestant.why_not
    if reason and reason != _INTERPRETED and dtype is None:
        raise backends.BackendUnavailable(f"{contestant.name} on {case.name}: {reason}")
    return contestant.make(case, contestant.name, dtype or case.dtype)


def operator_module(operator: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.operators.{operator}")


def device_unavailable_reason(device: str) -> str:
    """Return the reason why this machine has no such device, or ""."""
    if is_cuda(device) and not torch.cuda.is_available():
        return "there is no CUDA device"
    return ""


def _backend_unavailable_reason(case: Case, name: str) -> str:
    tensor = torch.empty(0, dtype=case.dtype, device=case.device)
    try:
        backends.choose(case.operator, tensor, name)
    except backends.BackendUnavailable as error:
        return str(error).partition(" was requested, but ")[2] or str(error)
    return "" if name != backends.TRITON or is_cuda(case.device) else _INTERPRETED


def words_of(error: BaseException) -> str:
    """First line of an error's message, or its type; also the second line if the first ends with a colon.

    Errors of torch.compile begin with "backend='inductor' raised:".
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:_MOST_CHARACTERS]
