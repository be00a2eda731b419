"""Tuning trials without a kernel, and a timer with given times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.tuning import tuner
from flmoe_kernels.core.triton.tuning.tuner import TuningKey

CPU = torch.device("cpu")
KEY = TuningKey("op.kernel", "16 bit", "bfloat16", (("rows", 64),), "a GPU")


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int
    warps: int
    shared: tuple[int, ...] = (0, 0, 0)


TABLE, BETTER, WORSE = Tiles(64, 4), Tiles(32, 4), Tiles(128, 8)
SECONDS = {TABLE: 2e-5, BETTER: 1e-5, WORSE: 3e-5}


@dataclasses.dataclass
class Clock:
    """Timer with given times that records what it timed."""

    seconds: dict[Tiles, float]
    timed: list[Tiles] = dataclasses.field(default_factory=list)

    def __call__(self, trial: tuning.Trial[Any]) -> float:
        trial.run()
        self.timed.append(trial.tiles)
        return self.seconds[trial.tiles]


def choices() -> dict[str, Any]:
    """The configurations that this process has chosen, by kernel."""
    return {key.kernel: configuration for key, configuration in tuner._choices.items()}


def refuse(_trial: tuning.Trial[Any]) -> float:
    raise AssertionError("nothing may be timed")


def sums(
    spoil: Callable[[Tiles, Tensor], None] = lambda _tiles, _out: None,
) -> Callable[[], Callable[[Tiles], tuning.Trial[Tiles]]]:
    """Trials that sum a vector in blocks of rows; `spoil` may break one."""
    x = torch.rand(1000, generator=torch.Generator().manual_seed(5))

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        out = torch.zeros(1)

        def run() -> None:
            out[0] = sum(part.sum() for part in x.split(tiles.rows))
            spoil(tiles, out)

        return tuning.Trial(tiles, CPU, run, [out])

    return lambda: make


def choose(timer: Any, prepare: Any = None, *, forget: bool = True) -> Tiles:
    """Choice of the tuner; forget: drop earlier choices of this process."""
    if forget:
        tuner.forget()
    with tuning.autotune(timer=timer):
        return tuning.choose(KEY, (TABLE, BETTER, WORSE), prepare or sums(), CPU)
