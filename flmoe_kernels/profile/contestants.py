"""Who computes a case: this package's backends and their peers, and each of them ready to be timed."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import torch

from flmoe_kernels._version import __version__
from flmoe_kernels.core import backend as backends

from .cases import Case
from .prepared import Contestant as Contestant
from .prepared import Prepared as Prepared
from .shapes import is_cuda

OURS, PEER = "ours", "peer"
_INTERPRETED = "it runs in Triton's interpreter here, whose time says nothing"


def contestants(case: Case) -> list[Contestant]:
    """All that there are, ours first; those that cannot run here say why not."""
    module = peers_of(case.operator)
    missing = device_lack(case.device)
    found = [
        Contestant(name, OURS, __version__, missing or _backend_lack(case, name))
        for name in backends.CAPABILITIES[case.operator]
        if name != backends.REFERENCE
    ]
    found += [
        Contestant(name, PEER, module.version(name), missing or module.lack(case, name))
        for name in module.PEERS
    ]
    return found


def running(case: Case, kind: str | None = None) -> list[Contestant]:
    """Those of a kind ("ours", "peer"; None for both) that run here."""
    return [x for x in contestants(case) if not x.why_not and kind in (None, x.kind)]


def default_ours(case: Case) -> Contestant:
    """The backend that a call gets which does not ask for one.

    Raises:
        backend.BackendUnavailable: none of this package's kernels runs this case here; with every reason.
    """
    ours = [x for x in contestants(case) if x.kind == OURS]
    runs = [x for x in ours if not x.why_not]
    if not runs:
        reasons = "; ".join(f"{x.name}: {x.why_not}" for x in ours)
        raise backends.BackendUnavailable(f"{case.name} on {case.device}: {reasons}")
    # Of several, a GPU takes the one in C++ first, see backend.choose.
    return next((x for x in runs if x.name == backends.CUDA), runs[0])


def prepare(case: Case, contestant: Contestant | str, dtype: torch.dtype | None = None) -> Prepared:
    """Make the inputs, the same for every contestant, and all that a timed call needs.

    Args:
        dtype: to compute in from inputs rounded to the case's dtype, for an exact result; None for the case's.

    Raises:
        ValueError: there is no such contestant.
        backend.BackendUnavailable: it is known that it cannot run this case here.
    """
    name = contestant if isinstance(contestant, str) else contestant.name
    known = {x.name: x for x in contestants(case)}
    if name not in known:
        raise ValueError(f"{case.name}: expected one of {', '.join(known)}, got {name!r}")
    reason = known[name].why_not
    if reason and reason != _INTERPRETED and dtype is None:
        raise backends.BackendUnavailable(f"{name} on {case.name}: {reason}")
    ready: Prepared = peers_of(case.operator).prepare(case, name, dtype or case.dtype)
    return dataclasses.replace(ready, contestant=name)


def oracle_name(case: Case) -> str:
    """The contestant whose result in float64 is the exact one."""
    return str(peers_of(case.operator).ORACLE)


def peers_of(operator: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.peers.{operator}")


def device_lack(device: str) -> str:
    """Why this machine has no such device, or ""."""
    if is_cuda(device) and not torch.cuda.is_available():
        return "there is no CUDA device"
    return ""


def _backend_lack(case: Case, name: str) -> str:
    reason = _refusal(case.operator, name, case.dtype, case.device)
    if not reason and name == backends.TRITON and not is_cuda(case.device):
        return _INTERPRETED
    return reason


def _refusal(operator: str, name: str, dtype: torch.dtype, device: str) -> str:
    try:
        backends.choose(operator, torch.empty(0, dtype=dtype, device=device), name)
    except backends.BackendUnavailable as error:
        return str(error).partition(" was asked for, but ")[2] or str(error)
    return ""
