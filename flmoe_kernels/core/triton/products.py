"""Matrix products of Triton kernels, and slices of their results."""

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


@triton.jit
def halves(x):
    """The columns of a tile, the lower half and the upper."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def slices(x, COUNT: tl.constexpr):
    """The columns of a tile in COUNT (a power of two) slices, in order."""
    if COUNT == 1:
        found = (x,)
    else:
        low, high = halves(x)
        if COUNT == 2:
            found = (low, high)
        elif COUNT == 4:
            found = halves(low) + halves(high)
        elif COUNT == 8:
            a, b = halves(low)
            c, d = halves(high)
            found = halves(a) + halves(b) + halves(c) + halves(d)
        else:
            found = slices(low, COUNT // 2) + slices(high, COUNT // 2)
    return found
