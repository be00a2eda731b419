"""Tests of the dropout generator: values, rates, independence, use in kernels."""

from __future__ import annotations

import pytest
import torch

from flmoe_kernels.core import dropout as rng
from tests.support.inputs import make_seed

RATES = (0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999)
WORD = 2**32 - 1
FULL = (WORD,) * 4
FAR = 1 << 31


def philox(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Philox 4x32 with Python integers."""
    a, b, c, d = counter
    low, high = key
    for _ in range(rounds):
        left, right = divmod(0xD2511F53 * a, 2**32), divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = right[0] ^ b ^ low, right[1], left[0] ^ d ^ high, left[1]
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return a, b, c, d


def draw(seed: int, problem: int, head: int, row: int, column: int) -> int:
    """The 16-bit draw of an element, as defined in the module's docstring."""
    counter = (16 * (column // 128) + column // 2 % 16, row, head, problem)
    words = philox(counter, (seed & WORD, seed >> 32 & WORD), rng.ROUNDS)
    return words[column // 32 % 4] >> 16 * (column % 2) & 0xFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (FULL, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_independent_generator_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox(counter, key, 10) == expected
    assert philox(counter, key, 9) != expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**61 + 987654321, -(2**63)])
@pytest.mark.parametrize("index", [(0, 0), (3, 1), (FAR + 7, FAR + 5)])
def test_mask_is_the_generators(seed: int, index: tuple[int, int]) -> None:
    problem, head = index
    rows, columns = [0, 1, 319, WORD], [0, 1, 2, 31, 32, 63, 127, 128, 255, 300, 4097]
    got = rng.keep_mask(
        make_seed(seed), 0.3, problem, head, torch.tensor(rows).view(-1, 1), torch.tensor(columns)
    )
    threshold = round(0.7 * 65536)
    draws = [[draw(seed, problem, head, row, column) for column in columns] for row in rows]
    assert got.tolist() == [[value < threshold for value in line] for line in draws]
    # Another number of rounds gives another mask.
    more = [philox((0, row, head, problem), (seed & WORD, 0), rng.ROUNDS + 1)[0] for row in rows]
    assert [value & 0xFFFF for value in more] != [line[0] for line in draws]


def test_threshold_and_scale_are_exact() -> None:
    for p in (*RATES, 0.0, 1.0, 1 / 3, 1e-6, 1 - 1e-6):
        threshold = rng.keep_threshold(p)
        assert abs(threshold / 65536 - (1 - p)) <= 2**-17 + 1e-15
        if threshold:
            assert threshold * rng.keep_scale(p) / 65536 == pytest.approx(1, rel=1e-15)
    assert (rng.keep_threshold(0.0), rng.keep_scale(0.0)) == (65536, 1.0)
    assert (rng.keep_threshold(0.5), rng.keep_scale(0.5)) == (32768, 2.0)
    assert (rng.keep_threshold(0.75), rng.keep_scale(0.75)) == (16384, 4.0)
    assert (rng.keep_threshold(1.0), rng.keep_scale(1.0)) == (0, 0.0)


def test_draw_equal_to_the_threshold_is_dropped() -> None:
    """An element is dropped if the threshold equals its draw, and kept if the threshold is larger by one."""
    value = draw(5, 0, 0, 0, 0)
    assert 0 < value < 65535
    at = torch.zeros(1, dtype=torch.int64)
    keeps, drops = 1 - (value + 1) / 65536, 1 - value / 65536
    assert rng.keep_mask(make_seed(5), keeps, 0, 0, at, at).item()
    assert not rng.keep_mask(make_seed(5), drops, 0, 0, at, at).item()


def test_fresh_seeds_follow_torchs_generator() -> None:
    torch.manual_seed(3)
    first, second = rng.new_seed(), rng.new_seed()
    torch.manual_seed(3)
    assert rng.new_seed() == first
    assert first != second
    assert first.dtype == torch.int64
    assert first.shape == ()
