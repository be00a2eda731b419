"""Tests of ties: groups of values, values to draw, leading experts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from flmoe_kernels.explain.figures.weights import leading
from flmoe_kernels.explain.reliability import TIE_ERRORS, alike, groups


def random_values(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    values, errors = draw.normal(size=count), draw.exponential(0.05, size=count)
    errors[draw.random(count) < 0.2] = 0.0
    values[: count // 4] = values[:1]
    return values, errors


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_groups_are_the_connected_components_of_ties(count: int) -> None:
    for seed in range(20):
        values, errors = random_values(count, seed)
        expected = list(range(count))
        for i, j in itertools.combinations(range(count), 2):
            reach = TIE_ERRORS * math.hypot(errors[i], errors[j])
            if abs(values[i] - values[j]) <= reach:
                old, new = expected[j], expected[i]
                expected = [new if x == old else x for x in expected]
        found = groups(values, errors)
        for i, j in itertools.product(range(count), repeat=2):
            assert (found[i] == found[j]) == (expected[i] == expected[j])
            assert found[i] <= found[j] or values[i] < values[j]


@pytest.mark.parametrize("seed", range(20))
def test_values_within_two_standard_errors_are_drawn_alike(seed: int) -> None:
    values, errors = random_values(30, seed)
    drawn = alike(values, errors)
    assert len(np.unique(drawn)) > 3, "a map of one colour would pass"
    for i, j in itertools.combinations(range(30), 2):
        if abs(values[i] - values[j]) <= 2 * math.hypot(errors[i], errors[j]):
            assert drawn[i] == drawn[j]
        if not errors.any():
            assert (drawn[i] == drawn[j]) == (values[i] == values[j])
    # Nothing is drawn with the other sign, and nothing uncertain alone with a colour.
    clear = np.abs(values) > 2 * errors
    assert (drawn * values >= 0).all()
    assert (drawn[[not clear[drawn == x].any() for x in drawn]] == 0).all()


def test_a_value_of_unknown_error_hides_no_other() -> None:
    values, errors = np.array([1.0, 0.5, np.nan, -0.7]), np.array([0.1, np.nan, 0.0, 0.1])
    np.testing.assert_array_equal(alike(values, errors), [1.0, 0.0, np.nan, -0.7])
    assert not alike(values[:2], errors[1:2].repeat(2)).any()


def test_experts_are_tied_within_two_standard_errors() -> None:
    weights = np.array([[0.5, 0.4, 0.1], [0.3, 0.4, 0.3], [0.5, 0.4, 0.1], [0.4, 0.4, 0.2]])
    assert leading(np.tile(weights, (4, 1))) == [0, 1]
    # A sample's own weights are exact; the error of a mean of fewer than 16 samples is unknown.
    assert leading(weights[:1]) == [0]
    assert leading(weights) == leading(np.tile(weights, (4, 1))[:15]) == [0, 1, 2]
    assert leading(np.array([[0.251, 0.22, 0.25, 0.251]])) == [0, 3, 2]
    # Differences of a sample's weights count, not the weights' own spread.
    assert leading(np.tile([[0.6, 0.4], [0.9, 0.7], [0.3, 0.1]], (6, 1))) == [0]
