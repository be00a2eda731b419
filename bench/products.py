"""torch's own product of two large square float32 matrices: what this machine is good for."""

from __future__ import annotations

from collections.abc import Callable

import torch

SGEMM_SIZE = 2048
SGEMM_FLOP = 2 * SGEMM_SIZE**3


def sgemm() -> Callable[[], None]:
    """One product, to take turns with what is compared to it."""
    a, b = (torch.randn(SGEMM_SIZE, SGEMM_SIZE) for _ in range(2))
    out = torch.empty(SGEMM_SIZE, SGEMM_SIZE)

    def call() -> None:
        torch.mm(a, b, out=out)

    return call
