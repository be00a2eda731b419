"""What the tuner runs: one candidate configuration of a kernel on the inputs of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Configuration = TypeVar("Configuration")

# Results are compared so many elements at a time, for the memory that float64 takes.
_AT_A_TIME = 2**24
# Candidates sum in other orders and so agree up to a few roundings: of results in their type, and of operands to
# TF32, which online maxima may shift. At the largest element, and a quarter of that in the root mean square.
_ROUNDINGS, _OF_OPERANDS = 4, 2.0**-11


@dataclass(frozen=True)
class Trial(Generic[Configuration]):
    """`run` fills `buffers`; `results` makes of them what is compared, in shapes that no configuration changes."""

    tiles: Configuration
    device: torch.device
    run: Callable[[], None]
    buffers: Sequence[Tensor]
    results: Callable[[], Sequence[Tensor]]

    def run_afresh(self) -> None:
        """Run into NaN: what another trial left in a buffer that they share must not pass for a result."""
        for buffer in self.buffers:
            buffer.fill_(float("nan"))
        self.run()


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
    parts = zip(*(one.reshape(-1).split(_AT_A_TIME) for one in (x, y)), strict=True)
    same, largest, squares = zip(*(_differences(*part) for part in parts), strict=True)
    error, size = torch.stack(largest).amax(dim=0)
    error_squares, size_squares = torch.stack(squares).sum(dim=0)
    near = (error <= allowed * size) & (error_squares <= (allowed / 4) ** 2 * size_squares)
    return bool(torch.stack(same).all() & near)


def _differences(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the same elements are NaN or infinite; of the others the largest |x - y| and |y|, and the sums of
    their squares."""
    x, y = x.double(), y.double()
    finite = y.isfinite()
    same = torch.where(finite, x.isfinite(), (x == y) | (x.isnan() & y.isnan())).all()
    both = torch.stack([(x - y).abs(), y.abs()]).where(finite, 0.0)
    return same, both.amax(dim=1), both.square().sum(dim=1)
