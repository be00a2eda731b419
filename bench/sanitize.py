"""Checked calls of kernels at tiny sizes, for compute-sanitizer: python -m bench.sanitize DEVICE [OPERATOR]"""

from __future__ import annotations

import sys

from bench.targets import tiny
from flmoe_kernels.profile.cases import BOTH, OPERATORS, Case, cases
from flmoe_kernels.profile.check import agree
from flmoe_kernels.profile.registry import OURS, contestants, words_of
from flmoe_kernels.profile.shapes import MIMIC, MMIMDB, PAIR_BASE, ROUTED_SMALL_E4

SHAPES = [tiny(PAIR_BASE), tiny(MMIMDB), tiny(MIMIC), tiny(ROUTED_SMALL_E4)]


def checked(device: str, operator: str | None = None) -> list[Case]:
    operators = None if operator is None else [operator]
    return cases(operators, SHAPES, (BOTH,), ("bfloat16",), device)


def main(device: str = "cuda", operator: str | None = None) -> int:
    """Number of failures; a case that fails does not end the others."""
    ran = failed = 0
    for case in checked(device, operator):
        for contestant in contestants(case):
            if contestant.kind != OURS or contestant.why_not:
                continue
            ran += 1
            try:
                agree(case, contestant)
                print(f"{case.name} {contestant.name}", flush=True)
            except Exception as error:
                failed += 1
                print(f"{case.name} {contestant.name}: FAILED: {words_of(error)}", flush=True)
    if not ran:
        print(f"no kernel of {operator or ', '.join(OPERATORS)} can run on {device} here")
    return failed or int(not ran)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
