"""Other implementations of the operators, one module per operator, with

PEERS                           names of the peers
unavailable_reason(case, name)  why a peer is not measured in this case, or ""; optional
version(name)                   version of the package that computes it; torch's if missing
prepare(case, name, dtype)      the call, see `flmoe_kernels.profile.registry.Contestant`
"""

from __future__ import annotations

import importlib

import torch

from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.registry import PEER, Contestant, contestants, device_unavailable_reason


def peers(case: Case) -> list[Contestant]:
    """The reference and all other implementations; those that cannot run here have a reason."""
    references = [contestant for contestant in contestants(case) if contestant.kind == PEER]
    if case.operator == "routing":
        return references
    module = importlib.import_module(f"{__name__}.{case.operator}")
    missing = device_unavailable_reason(case.device)
    reason = getattr(module, "unavailable_reason", lambda case, name: "")
    version = getattr(module, "version", lambda name: torch.__version__)
    return references + [
        Contestant(
            name,
            PEER,
            version(name),
            missing or reason(case, name),
            module.prepare,
        )
        for name in module.PEERS
    ]


def find(case: Case, name: str) -> Contestant:
    """The peer with a name."""
    return next(peer for peer in peers(case) if peer.name == name)
