"""Definition of dropout for all backends, with a counter-based generator.

Whether an element is kept depends only on (seed, problem, head, row, column), so a backward recomputes the mask
instead of reading it, and backends with the same seed drop the same elements. The generator is Philox 4x32
with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key = the seed's low and
high halves, counter = (column block, row, head, problem). A counter gives four 32-bit words, eight 16-bit
draws; column c uses block 16 * (c // 128) + (c // 2) % 16, word (c // 32) % 4 and half c % 2. A draw below
`keep_threshold(p)` keeps the element, which is then scaled by 65536 / threshold, so that the mean is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
DRAWS = 65536
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def keep_threshold(p: float) -> int:
    """Number of draws out of 65536 that keep an element; the rate is 1 - p to within 2^-17."""
    return round((1.0 - p) * DRAWS)


def keep_scale(p: float) -> float:
    """Factor of a kept value; 0 if nothing is kept."""
    threshold = keep_threshold(p)
    return DRAWS / threshold if threshold else 0.0


def new_seed(device: torch.device | str = "cpu") -> Tensor:
    """Draw a seed, () int64, from torch's generator, so that torch.manual_seed also controls dropout."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def keep_mask(
    seed: Tensor, p: float, problem: Tensor | int, head: Tensor | int, row: Tensor, column: Tensor
) -> Tensor:
    """The mask (True = kept) of the elements with these indices, which are broadcast.

    This is the slow, exact reference for the kernels' masks, in int64 arithmetic.
    """
    zero = torch.zeros_like(row + column)
    c0 = zero + 16 * (column // 128) + (column // 2) % 16
    c1, c2, c3 = zero + row, zero + head, zero + problem
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    word = (zero + column // 32) % 4
    value = torch.where(word < 2, torch.where(word == 0, c0, c1), torch.where(word == 2, c2, c3))
    draw = torch.where(column % 2 == 0, value & 0xFFFF, value >> 16)
    return draw < keep_threshold(p)
