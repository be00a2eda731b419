"""Kernels of bench/gpu.sh, compiled in parallel before anything runs: python -m bench.warm [TARGET] [OPERATOR]

TARGET: for example sm_90; default: the GPU of this machine. OPERATOR: only its kernels at tiny sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator

from bench.sanitize import checked
from bench.targets import TARGETS
from flmoe_kernels.core.backend import CAPABILITIES
from flmoe_kernels.core.dtypes import HALVES_AND_FLOAT32
from flmoe_kernels.profile import first_use
from flmoe_kernels.profile.shapes import small
from flmoe_kernels.profile.warmup import call_of, target_of, warm_up
from tests.gpu import kernels


def calls() -> Iterator[Callable[[], object]]:
    """Calls of targets, sanitized cases and tests, the most important first."""
    for target in TARGETS:
        case = target.case("cuda")
        yield call_of(case, outputs=True)
        if "peak" in target.most:
            yield call_of(dataclasses.replace(case, shape=small(case.shape)))
    for case in checked("cuda"):
        yield call_of(case, outputs=True)
    yield from kernels.calls()
    yield from first_use.calls(itertools.product(CAPABILITIES, HALVES_AND_FLOAT32))


def main(name: str | None = None, operator: str | None = None) -> int:
    start = time.monotonic()
    gpu = target_of(name)
    chosen = calls() if operator is None else map(call_of, checked("cpu", operator))
    warmed = warm_up(chosen, gpu, len(os.sched_getaffinity(0)))
    for failure in warmed.failures:
        print(failure)
    print(f"{gpu}: {warmed.compiled} kernels compiled, {time.monotonic() - start:.0f} s")
    return 1 if warmed.failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
