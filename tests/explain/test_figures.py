"""Tests of the figures: values, colours around 0, no change of matplotlib's state."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch, PathPatch

from flmoe_kernels.core.figures import png_bytes
from flmoe_kernels.explain import drop_curve, expert_weights, pair_network, token_patch_map
from flmoe_kernels.explain.figures.canvas import AGAINST, DOTS, FOR, HATCH
from flmoe_kernels.explain.figures.curves import BETTER, UNCLEAR, UNKNOWN, WORSE, compare
from flmoe_kernels.explain.figures.heat_map import grey
from flmoe_kernels.explain.figures.weights import leading
from flmoe_kernels.explain.masking.drops import KINDS
from flmoe_kernels.explain.reliability import LEAST_COUNT, alike
from tests.support.explain_results import masking_drops, pair_values
from tests.support.refusals import assert_refused

NAN = float("nan")
VALUES = np.array(
    [[0.5, NAN, -2.0, NAN], [NAN, NAN, NAN, NAN], [1.0, NAN, 0.25, NAN], [0.0, NAN, -0.5, NAN]]
)


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def labels(axes: Any, which: str) -> list[str]:
    return [text.get_text() for text in getattr(axes, f"get_{which}ticklabels")()]


def hatched_cells(axes: Any, hatch: str = HATCH) -> set[tuple[int, int]]:
    """(row, column) of the hatched cells."""
    found = set()
    for patch in axes.patches:
        if isinstance(patch, PathPatch):
            for corners in patch.get_path().to_polygons() if patch.get_hatch() == hatch else ():
                column, row = corners[:4].mean(axis=0)
                found.add((round(row), round(column)))
    return found


def test_map_holds_the_candidates_around_zero() -> None:
    words = ["a", "b", "cost $x$", "internationalisation"]
    figure = token_patch_map(VALUES, words, title="of one sample", unit="SII (logit)")
    axes, bar = figure.axes
    [image] = axes.get_images()
    kept = VALUES[np.ix_([0, 2, 3], [0, 2])]
    np.testing.assert_array_equal(image.get_array().filled(NAN), kept)
    assert image.get_clim() == (-2.0, 2.0)
    assert labels(axes, "y") == ["a (0)", r"cost \$x\$ (2)", "internationalisat\u2026 (3)"]
    assert labels(axes, "x") == ["0", "2"]
    assert hatched_cells(axes) == {(0, 1), (2, 1)}
    assert texts(axes) == [f"{value:.2g}" for value in kept.ravel()]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("token", "patch")
    assert bar.get_ylabel() == "SII (logit)"
    assert axes.get_title() == "hatched: below 0"
    assert labels(bar, "y") == ["-2", "0", "2"]
    assert figure.get_suptitle() == "of one sample"


@pytest.mark.parametrize("given", [False, True])
def test_weights_of_patches_over_the_image(given: bool) -> None:
    values = np.arange(-6.0, 6.0).reshape(2, 6)
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    own = np.array([0.0, -3.0, 1.0, 0.5, 0.0, 2.0]) if given else None
    figure = token_patch_map(
        values, image=picture, grid=(2, 3), weights=own, weights_label="attribution"
    )
    axes = figure.axes[1]
    below, over = axes.get_images()
    expected = (values.sum(axis=0) if own is None else own).reshape(2, 3)
    np.testing.assert_array_equal(over.get_array(), expected)
    limit = np.abs(expected).max()
    assert over.get_clim() == (-limit, limit)
    np.testing.assert_allclose(below.get_array(), grey(picture))
    # Both cover the same patches; patches with weight 0 are transparent.
    assert below.get_extent() == over.get_extent() == [-0.5, 2.5, 1.5, -0.5]
    np.testing.assert_allclose(over.get_alpha(), 0.75 * np.abs(expected) / limit)
    assert axes.get_title() == "attribution"
    assert ("hatched" in axes.get_xlabel()) == bool((expected < 0).any())


def drawn_lines(axes: Any) -> list[tuple[float, Any, bool]]:
    """(width, colour, solid) of each line, the strongest pair first."""
    lines = []
    for patch in reversed(axes.patches):
        solid = patch.get_linestyle() in ("-", "solid")
        lines.append((round(patch.get_linewidth(), 6), line_colour(patch), solid))
    return lines


def test_network_shows_sign_and_size() -> None:
    found = pair_values(standard_errors=np.array([0.01, 0.1, 0.1, 0.0]))
    figure = pair_network(found, 4, tokens=[["a", "b", "c"], None], names=["text", "image"])
    [axes] = figure.axes
    # Widths grow from 0.8 to 5 with |value| relative to the largest; 0.1 +- 0.1 is tied with 0.3, but 0.5 is not.
    expected = [(-1.0, AGAINST), (0.5, FOR), (0.2, FOR), (0.2, FOR)]
    for (width, colour, solid), (value, name) in zip(drawn_lines(axes), expected, strict=True):
        assert width == pytest.approx(0.8 + 4.2 * abs(value))
        assert colour == to_rgba(name)
        assert solid == (value > 0)
    assert axes.get_title() == "The 4 strongest scored pairs by |SII|"
    assert set(texts(axes)) == {"a (0)", "b (1)", "c (2)", "0", "1"}
    assert labels(axes, "x") == ["text", "image"]
    legend = axes.get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["above 0", "below 0"]
    assert "|SII| = 1 (logit)" in legend.get_title().get_text()
    assert "not distinguishable at 2 s.e." in legend.get_title().get_text()


def line_colour(line: FancyArrowPatch) -> Any:
    return tuple(line.get_edgecolor())


def test_curves_agree_with_the_summaries() -> None:
    metric = "logit"
    drops = masking_drops(samples=16)
    figure = drop_curve(drops, metric, title="by rollout")
    assert len(figure.axes) == 2
    for axes, kind in zip(figure.axes, KINDS, strict=True):
        curve = drops.curve(kind, metric)
        drawn = {line.get_label(): line for line in axes.get_lines()}
        [random] = [line for name, line in drawn.items() if name.startswith("random")]
        np.testing.assert_array_equal(random.get_ydata(), curve.random)
        bars, band = axes.containers[0], axes.collections
        np.testing.assert_array_equal(bars[0].get_xdata(), drops.budgets)
        np.testing.assert_array_equal(bars[0].get_ydata(), curve.identified)
        [segments] = bars[2]
        heights = [(top - low) / 2 for (_, low), (_, top) in segments.get_segments()]
        np.testing.assert_allclose(heights, 2 * curve.standard_error)
        [area] = [x for x in band if x.get_label().startswith("±")]
        edge = area.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose(edge.max(), (curve.random + 2 * curve.random_std).max())
        np.testing.assert_allclose(edge.min(), (curve.random - 2 * curve.random_std).min())
        named = " ".join(text.get_text() for text in axes.get_legend().get_texts())
        assert f"identified, AOPC {float(drops.aopc(kind, metric).identified):.3g}" in named
        assert kind in axes.get_title()
        assert axes.get_title().endswith(compare(drops, kind, metric))
        assert labels(axes, "x") == ["5", "10", "25"]
        assert axes.get_ylabel() == "drop of the target's logit"


def test_weights_by_sample_and_their_mean() -> None:
    weights = torch.rand(50, 4, dtype=torch.float64).softmax(dim=1)
    names = ["unique_0", "unique_1", "synergy", "redundancy"]
    left, right, _ = expert_weights(weights, names).axes
    [image] = left.get_images()
    np.testing.assert_array_equal(image.get_array(), weights)
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], weights.mean(dim=0))
    assert labels(left, "x") == labels(right, "x") == names


def test_map_shows_tied_values_in_one_colour() -> None:
    values = np.array([[0.5, 0.45, NAN], [-0.02, 0.9, -0.6]])
    errors = np.array([[0.03, 0.03, NAN], [0.02, 0.0, 0.01]])
    axes, bar = token_patch_map(values, errors=errors).axes
    drawn = axes.get_images()[0].get_array().filled(NAN)
    np.testing.assert_allclose(drawn, [[0.475, 0.475, NAN], [0.0, 0.9, -0.6]])
    assert axes.get_images()[0].get_clim() == (-0.9, 0.9)
    assert hatched_cells(axes) == {(1, 2)}
    assert hatched_cells(axes, DOTS) == {(1, 0)}
    lines = axes.get_title().splitlines()
    assert lines == [
        "hatched: below 0; dotted: tied across 0",
        "one colour: not distinguishable at 2 s.e.",
    ]
    assert bar.get_ylabel().endswith("standard error")
    assert "0.5\n\u00b10.03" in texts(axes)
    assert "0.9" in texts(axes)


@pytest.mark.parametrize(
    ("identified", "random", "verdict"),
    [
        ([0.50, 0.52, 0.49] * 6, [0.10, 0.12], BETTER),
        ([0.10, 0.12, 0.11] * 6, [0.50, 0.52], WORSE),
        ([0.10, 0.12, 0.14] * 6, [0.10, 0.12], UNCLEAR),  # within the spread of random sets
        ([0.50] + [0.05] * 17, [0.10], UNCLEAR),  # samples differ
        ([0.50] * 15, [0.10, 0.12], UNKNOWN),
        ([0.50] * 16, [], ""),
        ([0.50], [], ""),
    ],
)
def test_curves_state_whether_identified_tokens_differ_from_random_ones(
    identified: list[float], random: list[float], verdict: str
) -> None:
    samples, repeats = len(identified), len(random)
    drops = masking_drops(max(repeats, 1), samples)
    whole = torch.tensor(identified, dtype=torch.float64)[None, None, :, None].expand(2, 2, -1, 3)
    other = torch.tensor(random, dtype=torch.float64)[None, None, :, None, None]
    drops = dataclasses.replace(
        drops, identified=whole, random=other.expand(2, 2, repeats, samples, 3)
    )
    comprehensiveness, sufficiency = KINDS
    assert compare(drops, comprehensiveness) == verdict
    # Sufficiency is better if it is lower.
    opposite = {BETTER: WORSE, WORSE: BETTER}.get(verdict, verdict)
    assert compare(drops, sufficiency) == opposite
    upper = drop_curve(drops).axes[0]
    few = samples < LEAST_COUNT
    assert upper.containers[0].has_yerr == (not few)
    last = verdict or (UNKNOWN if few else "high is good")
    assert upper.get_title().splitlines()[-1] == last


def test_a_value_of_unknown_error_hides_no_other() -> None:
    values, errors = np.array([1.0, 0.5, np.nan, -0.7]), np.array([0.1, np.nan, 0.0, 0.1])
    np.testing.assert_array_equal(alike(values, errors), [1.0, 0.0, np.nan, -0.7])
    assert not alike(values[:2], errors[1:2].repeat(2)).any()
    assert not alike(np.array([0.3, -0.05]), np.array([0.05, 0.2])).any(), "tied across 0"


def test_experts_are_tied_within_two_standard_errors() -> None:
    weights = np.array([[0.5, 0.4, 0.1], [0.3, 0.4, 0.3], [0.5, 0.4, 0.1], [0.4, 0.4, 0.2]])
    assert leading(np.tile(weights, (4, 1))) == [0, 1]
    # A sample's own weights are exact; the error of a mean of fewer than 16 samples is unknown.
    assert leading(weights[:1]) == [0]
    assert leading(weights) == leading(np.tile(weights, (4, 1))[:15]) == [0, 1, 2]
    assert leading(np.array([[0.251, 0.22, 0.25, 0.251]])) == [0, 3, 2]
    # Differences of a sample's weights count, not the weights' own spread.
    assert leading(np.tile([[0.6, 0.4], [0.9, 0.7], [0.3, 0.1]], (6, 1))) == [0]


CALLS: dict[str, Any] = {
    "map": lambda: token_patch_map(VALUES, image=np.full((4, 4), 0.5)),
    "network": lambda: pair_network(pair_values()),
    "curve": lambda: drop_curve(masking_drops()),
    "weights": lambda: expert_weights(torch.full((2, 4), 0.25, dtype=torch.bfloat16), "abcd"),
}


@pytest.mark.parametrize("name", CALLS)
def test_equal_inputs_give_equal_bytes_and_change_no_global_state(name: str) -> None:
    before = dict(matplotlib.rcParams)
    first = png_bytes(CALLS[name](), dpi=50)
    assert first.startswith(b"\x89PNG\r\n")
    assert png_bytes(CALLS[name](), dpi=50) == first
    assert dict(matplotlib.rcParams) == before


PAIRS = pair_values()
FIGURES: Any = (expert_weights, pair_network, token_patch_map)
bars, network, heat_map = FIGURES
IMAGE = np.zeros((4, 4))
MISTAKES: list[tuple[Any, str]] = [
    (lambda: heat_map(np.zeros(3)), r"values: expected numbers \(La, Lb\)"),
    (lambda: heat_map(np.full((2, 3), NAN)), "values: expected at least one finite value"),
    (lambda: heat_map(VALUES[:, :3], image=IMAGE), "grid: .* 3 is not a square number"),
    (lambda: heat_map(VALUES, image=IMAGE, grid=(1, 3)), r"grid: .* 4 patches, got \(1, 3\)"),
    (lambda: heat_map(VALUES, image=IMAGE + 2), "image: expected floats"),
    (lambda: heat_map(VALUES, image=IMAGE, weights=[1.0]), r"weights: .*\(4,\), got \(1,\)"),
    (lambda: heat_map(VALUES, errors=np.zeros((4, 3))), r"errors: .* shape \(4, 4\) of values"),
    (lambda: heat_map(VALUES, errors=VALUES), "errors: expected numbers from 0, got -2"),
    (lambda: network(pair_values(values=np.full(4, NAN))), "found: expected a pair with a"),
    (lambda: network(PAIRS, 0), "n: expected an int from 1"),
    (lambda: network(PAIRS, tokens=[["a"], None]), r"tokens\[0\]: expected 3"),
    (lambda: bars(np.full((2, 2), NAN), "ab"), "weights: expected finite"),
    (lambda: bars([[1.0, 2.0], [3.0]], "ab"), r"weights: expected numbers \(S, E\), such"),
    (lambda: network({"SII": PAIRS}), r"TypeError: found: .* got dict \(pass one of"),
    (lambda: heat_map(PAIRS), r"TypeError: values: .* PairValues.between\(0, 1\), got PairValues$"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    assert_refused(call, message)
