"""Other implementations of each operator, one module each, with

PEERS                       their names
unavailable_reason(case, name)  why a peer does not compute this case here, or ""
version(name)               of the package that computes
prepare(case, name, dtype)  the call, see `flmoe_kernels.profile.registry.Contestant`
"""

from __future__ import annotations

import importlib

from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.registry import PEER, Contestant, contestants, device_unavailable_reason


def peers(case: Case) -> list[Contestant]:
    """The reference and all other implementations; those that cannot run here say why."""
    found = [contestant for contestant in contestants(case) if contestant.kind == PEER]
    if case.operator == "routing":
        return found
    module = importlib.import_module(f"{__name__}.{case.operator}")
    missing = device_unavailable_reason(case.device)
    return found + [
        Contestant(
            name,
            PEER,
            module.version(name),
            missing or module.unavailable_reason(case, name),
            module.prepare,
        )
        for name in module.PEERS
    ]


def find(case: Case, name: str) -> Contestant:
    """A peer by its name."""
    return next(peer for peer in peers(case) if peer.name == name)
