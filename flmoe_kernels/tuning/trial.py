"""What the tuner runs: one candidate configuration of a kernel on the inputs of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Configuration = TypeVar("Configuration")

# Candidates sum in other orders and so agree up to a few roundings: of results in their type, and of operands to
# TF32, which online maxima may shift. At the largest element, and a quarter of that in the root mean square.
_ROUNDINGS, _OF_OPERANDS = 4, 2.0**-11


@dataclass(frozen=True)
class Trial(Generic[Configuration]):
    """`run` fills what `results` returns, in an order and in shapes that no configuration changes."""

    tiles: Configuration
    device: torch.device
    run: Callable[[], None]
    results: Callable[[], Sequence[Tensor]]


def agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether results are those of the launch table, up to the roundings of another order of sums.

    Where one is NaN or infinite the other is the same.
    """
    return len(found) == len(wanted) and all(map(_near, found, wanted))


def _near(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not y.numel():
        return True
    allowed = max(_ROUNDINGS * torch.finfo(y.dtype).eps, _OF_OPERANDS)
    x, y = x.double(), y.double()
    finite = y.isfinite()
    if not torch.equal(x.isfinite(), finite):
        return False
    odd = ~finite
    if not torch.equal(x[odd].nan_to_num(nan=0.5), y[odd].nan_to_num(nan=0.5)):
        return False
    error, y = (x[finite] - y[finite]).abs(), y[finite].abs()
    if not y.numel():
        return True
    at_most, on_average = error.max() <= allowed * y.max(), error.norm() <= allowed / 4 * y.norm()
    return bool(at_most & on_average)
