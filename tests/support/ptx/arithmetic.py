"""Functions of PTX instructions that only compute.

Approximate instructions (ex2, rsqrt, sqrt, div.full) have NumPy's rounding, which is within PTX's error bounds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[..., Array]

# Modifiers that no kernel has.
_REFUSED = {"sat", "NaN", "cc", "abs", "relu", "rz", "rm", "rp", "hi"}
_SMALLEST = np.finfo(np.float32).smallest_normal


@dataclass(frozen=True)
class Operation:
    """A function, and the dtypes of its operands, which have the sizes of the registers' unsigned integers."""

    function: Function
    operands: tuple[np.dtype, ...]


@functools.cache
def dtype_of(kind: str) -> np.dtype:
    """The dtype of a PTX type; an unsigned integer for those that NumPy does not have."""
    if kind == "pred":
        return np.dtype("?")
    found = re.fullmatch(r"(s|f|u|b|bf|tf)(\d+)(x2)?", kind)
    if found is None:
        raise NotImplementedError(kind)
    size = 4 if found[3] or found[1] == "tf" else int(found[2]) // 8
    return np.dtype(f"{'u' if found[3] else {'s': 'i', 'f': 'f'}.get(found[1], 'u')}{size}")


def fit(x: Array, dtype: np.dtype) -> Array:
    """The same bits, extended or truncated to another size."""
    if x.itemsize != dtype.itemsize:
        x = x.astype(f"{x.dtype.kind}{dtype.itemsize}")
    return x if x.dtype == dtype else x.view(dtype)


def operation(op: str, count: int) -> Operation:
    """The operation of an instruction with `count` operands.

    Raises:
        NotImplementedError: no kernel has such an instruction.
    """
    root, *modifiers = op.split(".")
    dtype = dtype_of(modifiers[-1])
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if dtype.itemsize in (2, 4) else dtype
    word, floating = np.dtype("u4"), dtype.kind == "f" or "f" in modifiers[-1]
    match root:
        case "mul" | "mad" if "wide" in modifiers:
            product = lambda a, b, c=0: a.astype(wide) * b.astype(wide) + c  # noqa: E731
            return Operation(product, (dtype, dtype, wide)[:count])
        case "mul" if "hi" in modifiers:
            bits = 8 * dtype.itemsize
            return Operation(
                lambda a, b: (a.astype(wide) * b >> bits).astype(dtype), (dtype, dtype)
            )
        case "mad" if "lo" in modifiers:
            return Operation(lambda a, b, c: a * b + c, (dtype,) * 3)
        case "shl" | "shr":
            # NumPy clamps counts as PTX does.
            shift = np.left_shift if root == "shl" else np.right_shift
            return Operation(lambda x, n: shift(x, n.astype(dtype)), (dtype, word))
        case "selp":
            select = lambda a, b, p: np.where(p, a, b)  # noqa: E731
            return Operation(select, (dtype, dtype, np.dtype("?")))
        case "setp" if len(modifiers) == 2:
            return Operation(_comparison(modifiers[0], floating), (dtype, dtype))
        case "bfe":
            return Operation(lambda *x: _extract(wide, *x), (dtype, word, word))
        case "bfi":
            return Operation(_insert, (word,) * 4)
        case "clz":
            # The exponent of the value, in float64, is exact for 32 bits.
            return Operation(lambda x: word.type(32) - np.frexp(x)[1].astype(word), (word,))
        case "popc":
            return Operation(lambda x: np.bitwise_count(x).astype(word), (dtype,))
        case "prmt" if len(modifiers) == 1:
            return Operation(_permute, (word,) * 3)
        case "cvt":
            of = dtype_of(modifiers[-1])
            return Operation(_conversion(modifiers), (of,) * count)
    function = _FLOAT.get(root) if floating else _INTEGER.get(root)
    if function is None or _REFUSED & set(modifiers):
        raise NotImplementedError(op)
    if floating and "ftz" in modifiers:
        function = _flushed(function)
    if modifiers[-1].startswith("bf16"):
        function = _of_bfloat16(function)
    if modifiers[-1].endswith("x2"):
        function = _of_pairs(function, np.dtype("u2" if "bf16x2" in modifiers else "f2"))
    return Operation(function, (dtype,) * count)


def _of_bfloat16(function: Function) -> Function:
    return lambda *operands: _narrow_bfloat16(function(*map(widen_bfloat16, operands)))


def _of_pairs(function: Function, half: np.dtype) -> Function:
    """The function of the halves of words."""

    def of_pairs(*operands: Array) -> Array:
        found = function(*(x.view(half).reshape(-1, 2) for x in operands))
        return np.ascontiguousarray(found).view("u4").reshape(-1)

    return of_pairs


def _quotient(a: Array, b: Array) -> Array:
    """Rounded toward zero; exact for 32 bits."""
    return np.trunc(a.astype(np.float64) / b).astype(a.dtype)


_BOTH: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
}
_INTEGER: dict[str, Function] = _BOTH | {
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "div": _quotient,
    "rem": lambda a, b: a - b * _quotient(a, b),
}
_FLOAT: dict[str, Function] = _BOTH | {
    "min": np.fmin,
    "max": np.fmax,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
    "div": np.divide,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: (1 / np.sqrt(x, dtype=np.float64)).astype(np.float32),
    "ex2": np.exp2,
}


def _flushed(function: Function) -> Function:
    """With subnormal operands and results replaced by zero."""

    def flush(x: Array) -> Array:
        return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)

    return lambda *operands: flush(function(*map(flush, operands)))


_COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _comparison(name: str, floating: bool) -> Function:
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    compare = _COMPARE[name.removesuffix("u")]
    if not floating:
        return compare
    if name.endswith("u"):
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


def _extract(wide: np.dtype, x: Array, first: Array, length: Array) -> Array:
    """`length` bits from bit `first` on, extended by their sign."""
    high = (64 - first - length).astype(wide)
    return (x.astype(wide) << high >> (64 - length).astype(wide)).astype(x.dtype)


def _insert(a: Array, b: Array, first: Array, length: Array) -> Array:
    """b with `length` bits from bit `first` on replaced by the lowest bits of a."""
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1) << first).astype(np.uint32)
    return a << first & mask | b & ~mask


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of b:a, chosen by the four lowest nibbles of the selector; bit 3 selects the byte's sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    found = np.zeros(1, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)) * np.uint32(8))).astype(np.uint8)
        sign = (byte.view(np.int8) >> 7).view(np.uint8)
        chosen = np.where(nibble & np.uint32(8), sign, byte)
        found = found | chosen.astype(np.uint32) << np.uint32(8 * i)
    return found


def widen_bfloat16(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round(x: Array, bits: int) -> Array:
    """Bits of float32 values, rounded to the nearest without the last `bits` bits; ties to even."""
    raw = x.view(np.uint32)
    half = np.uint32((1 << bits - 1) - 1) + (raw >> np.uint32(bits) & np.uint32(1))
    # The sum carries into the exponent, and NaN must stay NaN.
    return np.where(np.isfinite(x), raw + half, np.where(np.isnan(x), np.uint32(0x7FFFFFFF), raw))


def _narrow_bfloat16(x: Array) -> Array:
    return (_round(x, 16) >> np.uint32(16)).astype(np.uint16)


def _half(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def _tf32(x: Array) -> Array:
    """Rounded to ten bits of mantissa, ties away from zero."""
    rounded = x.view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, x.view(np.uint32))


def _conversion(modifiers: list[str]) -> Function:
    *rounding, to, of = modifiers
    match (*rounding, to, of):
        case ("f32", "bf16"):
            return widen_bfloat16
        case ("rn", "bf16", "f32"):
            return _narrow_bfloat16
        case ("rn", "bf16x2", "f32"):
            return lambda high, low: _pair(_narrow_bfloat16(high), _narrow_bfloat16(low))
        case ("rn", "f16x2", "f32"):
            return lambda high, low: _pair(_half(high), _half(low))
        case ("rna", "tf32", "f32"):
            return _tf32
        case ("rn", "f16", "f32") | ("f32", "f16") | ("rn", "f32", "f64") | ("f64", "f32"):
            return lambda x: x.astype(dtype_of(to))
    if of[0] in "us" and (to[0] in "us" or (rounding == ["rn"] and to == "f32")):
        return lambda x: x.astype(dtype_of(to))
    raise NotImplementedError(f"cvt.{'.'.join(modifiers)}")


def _pair(high: Array, low: Array) -> Array:
    return high.astype(np.uint32) << np.uint32(16) | low
