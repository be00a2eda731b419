"""Benchmarks against plain implementations, with results compared first."""

from itertools import pairwise

import numpy as np
from tinyseries import count_pairs, moving_average, one_hot

RANDOM = np.random.default_rng(0)


def test_moving_average(benchmark_against):
    x, width = RANDOM.normal(size=20_000), 50

    def ours():
        return moving_average(x, width)

    def convolved():
        return np.convolve(x, np.full(width, 1 / width), mode="valid")

    np.testing.assert_allclose(ours(), convolved(), atol=1e-9)
    benchmark_against(ours, convolved, name="moving_average/20000", peer_name="numpy.convolve")


def test_one_hot(benchmark_against):
    labels = RANDOM.integers(0, 100, size=5_000)

    def ours():
        return one_hot(labels, 100)

    def compared():
        return (labels[:, None] == np.arange(100)).astype(float)

    np.testing.assert_array_equal(ours(), compared())
    benchmark_against(ours, compared, name="one_hot/5000", peer_name="comparison")


def test_count_pairs(benchmark_against):
    words = RANDOM.choice(["a", "b", "c", "d"], size=5_000).tolist()

    def ours():
        return count_pairs(words)

    def looped():
        counts = {}
        for pair in pairwise(words):
            counts[pair] = counts.get(pair, 0) + 1
        return counts

    assert ours() == looped()
    benchmark_against(ours, looped, name="count_pairs/5000", peer_name="loop")
