"""Matrix products of Triton kernels."""

# mypy: ignore-errors
# Triton kernels have no type annotations.

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter would multiply the integer representation of bfloat16, so operands are widened there.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(x, y, total, PRECISION: tl.constexpr = "ieee"):
    """total + x @ y in float32, with x rounded to y's type. PRECISION, from launches.matrix_precision, is that of
    float32 operands; products of 16 bits are exact."""
    if INTERPRETED and y.dtype == tl.bfloat16:
        x, y = x.to(tl.float32), y.to(tl.float32)
    else:
        x = x.to(y.dtype)
    return tl.dot(x, y, total, input_precision=PRECISION if y.dtype == tl.float32 else "ieee")
