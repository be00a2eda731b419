"""Host cost of a training step of InteractionMoE and of pair_moe on Triton, counted without a GPU.

    python -m tests.support.host_cost mimic

The kernels are compiled for sm_90 in bfloat16, and launches do nothing. Times are comparable on one machine only.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

from flmoe_kernels.profile.cases import BOTH, FORWARD, Case
from flmoe_kernels.profile.operators import pair_moe
from flmoe_kernels.profile.operators.interaction_moe import prepare
from flmoe_kernels.profile.shapes import LayerShape, PairShape, by_name
from tests.support.triton_driver import compiled_to_ptx

CALLS = 100
LAUNCHES, KERNELS, NEW_KERNELS = (
    "launches",
    "kernels compiled",
    "kernels compiled for other sizes",
)
OPERATORS, ATEN, TIME = "operator calls", "ATen calls", "host ms of a step"
PAIR_ATEN, PAIR_TIME = "ATen calls of pair_moe", "host us of pair_moe"


def measure(name: str) -> dict[str, float]:
    """Counts and time of a step at a named shape; the other sizes: a fifth of the samples, one token more."""
    launched: list[str] = []
    compiled: list[str] = []
    shape = by_name(name, "cpu")
    assert isinstance(shape, LayerShape)
    tokens = tuple(count + 1 for count in shape.tokens)
    other = dataclasses.replace(shape, batch=max(1, shape.batch // 5), tokens=tokens)

    def launch(source: Any, *_: Any) -> None:
        launched.append(source.fn.__name__)

    triton.knobs.compilation.listener = lambda src, **_: compiled.append(src.name)
    torch.set_num_threads(1)
    with compiled_to_ptx(90, str, launch, 90):
        step, step_of_other = (
            prepare(
                Case("interaction_moe", each, BOTH, torch.bfloat16), "triton", torch.bfloat16
            ).call
            for each in (shape, other)
        )
        step()
        found: dict[str, float] = {KERNELS: len(compiled)}
        step()
        step()  # from plans
        launched.clear()
        with torch.profiler.profile() as profile:
            step()
        found[LAUNCHES] = len(launched)
        # The ranges of steps within encoder_layers have names of operators.
        calls = [x.name for x in profile.events() if not x.is_user_annotation]
        for what, prefix in ((OPERATORS, "flmoe::"), (ATEN, "aten::")):
            found[what] = sum(name.startswith(prefix) for name in calls)
        compiled.clear()
        step_of_other()
        found[NEW_KERNELS] = len(compiled)
        step_of_other()
        # Of the smaller batch, because torch's own operators compute on the CPU here.
        found[TIME] = 1e3 * _seconds(step_of_other)
    return found


def measure_pairs() -> dict[str, float]:
    """ATen calls and time of the forward of pair_moe at pair_base, and kernels compiled for other lengths."""
    shape = by_name("pair_base", "cpu")
    assert isinstance(shape, PairShape)
    other = dataclasses.replace(shape, batch=3, rows=101, columns=77)
    compiled: list[str] = []
    triton.knobs.compilation.listener = lambda src, **_: compiled.append(src.name)
    torch.set_num_threads(1)
    with compiled_to_ptx(90, str, lambda *_: None, 90):
        call, call_of_other, training, training_of_other = (
            pair_moe.prepare(
                Case("pair_moe", each, phase, torch.bfloat16, variant="none"),
                "triton",
                torch.bfloat16,
            ).call
            for phase in (FORWARD, BOTH)
            for each in (shape, other)
        )
        call()
        training()
        compiled.clear()
        call_of_other()
        training_of_other()
        found: dict[str, float] = {NEW_KERNELS: len(compiled)}
        for _ in range(3):  # the third is from a plan
            call()
        with torch.profiler.profile() as profile:
            call()
        calls = [x.name for x in profile.events() if x.name.startswith("aten::")]
        return found | {PAIR_ATEN: len(calls), PAIR_TIME: 1e6 * _seconds(call)}


def _seconds(call: Callable[[], None]) -> float:
    """The least time of a call."""
    seconds = []
    for _ in range(CALLS):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    for counts in (measure(sys.argv[1]), measure_pairs()):
        for what, value in counts.items():
            print(f"{what:36}{value:8.4g}")
