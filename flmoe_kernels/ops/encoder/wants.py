"""Which gradients of rows the encoder's backward operators compute."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def rows_wanted(
    seed: Tensor | None, self_residual: bool, wants: Sequence[bool]
) -> tuple[bool, bool]:
    """Whether the gradients of residual and update are computed; wants begins with the requested ones.

    Without dropout both are equal, and the first result serves both. self_residual: there is no residual.
    """
    residual, update = wants[:2]
    if self_residual:
        return False, update
    return (residual or update, False) if seed is None else (residual, update)
