"""Tests of the native product in bfloat16: the emulated instruction, the processor's, and their packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.native import address, instruction_sets, native

BFLOAT16 = torch.bfloat16
SIZES = [(1, 1, 1), (1, 17, 3), (7, 64, 8), (13, 80, 33), (6, 130, 127)]
EACH_SIZE = pytest.mark.parametrize("sizes", SIZES, ids=str)
EACH_LAYOUT = pytest.mark.parametrize("depth_is_rows", [False, True], ids=["layer", "gradient"])


def random_bits(*shape: int) -> Tensor:
    """Any bfloat16: normal numbers, subnormal ones, infinities, NaN."""
    bits = torch.randint(0, 1 << 16, shape, dtype=torch.int32, generator=torch.manual_seed(0))
    return bits.to(torch.int16).view(BFLOAT16)


def moderate(*shape: int) -> Tensor:
    """Numbers of 2^-6 to 2^6, so that the sum of a product and a float32 is exact in float64."""
    generator = torch.manual_seed(0)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    exponent = torch.randint(-6, 6, shape, generator=generator)
    return (sign * (1 + torch.rand(shape, generator=generator)) * 2.0**exponent).to(BFLOAT16)


def product(a: Tensor, b: Tensor, c: Tensor, depth_is_rows: bool, emulated: bool) -> Tensor:
    """c + a @ b of a (m, depth) and b (depth, n); the native function gets contiguous operands."""
    (m, depth), n = a.shape, b.shape[1]
    padded = -(-n // 16) * 16
    out = torch.zeros(m, padded)
    out[:, :n] = c
    operands = [
        (a.T if depth_is_rows else a).contiguous(),
        (b if depth_is_rows else b.T).contiguous(),
    ]
    native().product_bf16(
        *map(address, (*operands, out)), (m, n, padded, depth), depth_is_rows, not emulated
    )
    assert (out[:, n:] == 0).all() or a.isnan().any() or a.isinf().any()
    return out[:, :n].contiguous()


def stated(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The instruction's arithmetic: of each pair the second product is added first; every sum is rounded."""
    wide = [x.double().numpy() for x in (a, b)]
    total = np.zeros(c.shape, np.float32)
    for first in range(0, a.shape[1], 2):
        for k in range(min(first + 1, a.shape[1] - 1), first - 1, -1):
            total = (total + np.outer(wide[0][:, k], wide[1][k])).astype(np.float32)
    return c + torch.from_numpy(total)


@EACH_SIZE
@EACH_LAYOUT
def test_the_emulation_is_the_stated_arithmetic(
    sizes: tuple[int, int, int], depth_is_rows: bool
) -> None:
    m, n, depth = sizes
    a, b, c = moderate(m, depth), moderate(depth, n), torch.rand(m, n)
    result = product(a, b, c, depth_is_rows, emulated=True)
    assert torch.equal(result, stated(a, b, c))
    if depth > 8:
        swapped = stated(a.flip(1), b.flip(0), c)
        assert not torch.equal(result, swapped), "the order of the sums shows"


@pytest.mark.skipif("avx512bf16" not in instruction_sets(), reason="no AVX512-BF16")
@EACH_SIZE
@EACH_LAYOUT
@pytest.mark.parametrize("draw", [moderate, random_bits])
def test_the_processor_computes_what_is_emulated(
    draw: object, sizes: tuple[int, int, int], depth_is_rows: bool
) -> None:
    m, n, depth = sizes
    a, b, c = draw(m, depth), draw(depth, n), torch.rand(m, n)  # type: ignore[operator]
    results = [product(a, b, c, depth_is_rows, emulated) for emulated in (False, True)]
    assert torch.equal(*(x.isnan() for x in results))
    assert torch.equal(*(x.nan_to_num(0.0) for x in results))


@EACH_LAYOUT
def test_subnormal_operands_and_sums_are_zero(depth_is_rows: bool) -> None:
    """As documented for the instruction; a product that underflows does, too."""
    tiny, small = 2.0**-130, 2.0**-80
    a = torch.tensor([[tiny, small, 1.0]], dtype=BFLOAT16)
    b = torch.tensor([[1.0], [small], [3.0]], dtype=BFLOAT16)
    assert float(product(a, b, torch.zeros(1, 1), depth_is_rows, emulated=True)) == 3.0
    assert float(product(a[:, :2], b[:2], torch.zeros(1, 1), depth_is_rows, emulated=True)) == 0.0
