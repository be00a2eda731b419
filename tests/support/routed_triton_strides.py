"""Prints the types of the products with D in the gradient of x, for weights of fewer and of 2^31 elements.

Run by test_triton_static, in a process of its own: one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import re

from bench.aot.architectures import H100
from bench.aot.cases import CASES, listed

WIDTHS = {"routed_large": 2048, "widths 65536, 32768": 65536}


def products_with(ttir: str, factor: int) -> set[str]:
    """The types of the products of a scalar that is no constant with `factor`."""
    found = set()
    for kind in ("i32", "i64"):
        constants = re.findall(rf"(%\S+) = arith\.constant {factor} : {kind}\b", ttir)
        products = re.findall(rf"arith\.muli (%[^\s,]+), (%\S+) : {kind}\b", ttir)
        if any(set(pair) & set(constants) for pair in products):
            found.add(kind)
    return found


def main() -> None:
    every = listed(CASES)
    for shape, width in WIDTHS.items():
        launch = every[f"routed_mlp/grad_x/{shape}/bfloat16"].built(H100).launch
        ttir = launch.compiled(H100.number).asm["ttir"]
        print(f"{width}: {' '.join(sorted(products_with(ttir, width)))}", flush=True)


if __name__ == "__main__":
    main()
