"""Host cost of a training step of InteractionMoE on its Triton kernels, counted without a GPU.

    python -m tests.support.host_cost mimic

The kernels are compiled for sm_90 in bfloat16, and launches do nothing. Times are comparable on one machine only.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import torch
import triton

from flmoe_kernels.profile.cases import BOTH, Case
from flmoe_kernels.profile.operators.interaction_moe import prepare
from flmoe_kernels.profile.shapes import LayerShape, by_name
from tests.support.triton_driver import compiled_to_ptx

STEPS = 15
LAUNCHES, KERNELS, NEW_KERNELS = (
    "launches",
    "kernels compiled",
    "kernels compiled for another batch",
)
OPERATORS, ATEN, TIME = "operator calls", "ATen calls", "host ms of a step"


def measure(name: str) -> dict[str, float]:
    """Counts and time of a step at a named shape; the other batch has a fifth of the samples."""
    launched: list[str] = []
    compiled: list[str] = []
    shape = by_name(name, "cpu")
    assert isinstance(shape, LayerShape)
    other = dataclasses.replace(shape, batch=max(1, shape.batch // 5))

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
        found: dict[str, float] = {LAUNCHES: len(launched), KERNELS: len(compiled)}
        step()
        with torch.profiler.profile() as profile:
            step()
        # The ranges of steps within encoder_layers have names of operators.
        calls = [x.name for x in profile.events() if not x.is_user_annotation]
        for what, prefix in ((OPERATORS, "flmoe::"), (ATEN, "aten::")):
            found[what] = sum(name.startswith(prefix) for name in calls)
        seconds = []
        for _ in range(STEPS):
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
        found[TIME] = 1e3 * min(seconds)
        compiled.clear()
        step_of_other()
        found[NEW_KERNELS] = len(compiled)
    return found


if __name__ == "__main__":
    for what, value in measure(sys.argv[1]).items():
        print(f"{what:36}{value:8.4g}")
