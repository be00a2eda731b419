"""Checked calls of all kernels at tiny sizes, for compute-sanitizer: python -m bench.sanitize [cpu|cuda]"""

from __future__ import annotations

import dataclasses
import sys

from flmoe_kernels.profile.cases import BOTH, cases
from flmoe_kernels.profile.check import agree
from flmoe_kernels.profile.registry import OURS, contestants
from flmoe_kernels.profile.shapes import MIMIC, MMIMDB, PAIR_BASE, ROUTED_SMALL_E4

SHAPES = (
    dataclasses.replace(PAIR_BASE, batch=2, rows=33, columns=18, rank=16, width=16),
    dataclasses.replace(MMIMDB, batch=2, tokens=(7, 7), valid=(5, None), dim=32, heads=2),
    dataclasses.replace(MIMIC, batch=2, dim=32, heads=2),
    dataclasses.replace(ROUTED_SMALL_E4, tokens=67, width=32, hidden=48),
)


def main(device: str = "cuda") -> None:
    ran = 0
    for case in cases(shapes=SHAPES, phases=(BOTH,), dtypes=("bfloat16",), device=device):
        for contestant in contestants(case):
            if contestant.kind == OURS and not contestant.why_not:
                agree(case, contestant)
                print(f"{case.name} {contestant.name}", flush=True)
                ran += 1
    if not ran:
        sys.exit(f"no kernel can run on {device} on this machine")


if __name__ == "__main__":
    main(*sys.argv[1:])
