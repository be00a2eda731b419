"""Tests of the figures: values, colours around 0, no change of matplotlib's state."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
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
from flmoe_kernels.explain.figures.canvas import AGAINST, DOTS, FOR, HATCH, UNSURE
from flmoe_kernels.explain.figures.curves import BETTER, UNCLEAR, UNKNOWN, WORSE, compare
from flmoe_kernels.explain.figures.heat_map import grey
from flmoe_kernels.explain.figures.weights import FEW, leading
from flmoe_kernels.explain.masking.drops import KINDS
from flmoe_kernels.explain.reliability import LEAST_COUNT, alike, groups
from tests.support.explain_results import masking_drops, pair_values
from tests.support.refusals import assert_refused

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("value", [-0.5, 0.0, 1e-6])
def test_one_patch(value: float) -> None:
    figure = token_patch_map(np.array([[value]]), image=np.full((3, 5), 0.5))
    axes = figure.axes[1]
    assert axes.get_xlabel() == ("hatched: below 0" if value < 0 else "")
    low, high = figure.axes[-1].get_ylim()
    assert (low < 0) == (value < 0)
    assert high == pytest.approx(abs(value) or 1.0)
    assert png_bytes(figure, dpi=40)


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


def test_unknown_errors_distinguish_nothing_and_pairs_without_value_have_no_line() -> None:
    unknown = pair_values(values=np.array([0.5, -1.0, NAN, 0.3]), standard_errors=np.full(4, NAN))
    [axes] = pair_network(unknown, 4).axes
    assert drawn_lines(axes) == [(0.8, to_rgba(UNSURE), False)] * 3
    axes = token_patch_map(VALUES, errors=np.full((4, 4), NAN)).axes[0]
    assert not axes.get_images()[0].get_array().any()
    assert len(hatched_cells(axes, DOTS)) == 6
    assert texts(axes)[0] == "0.5"


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


def test_network_draws_tied_pairs_alike_and_counts_those_left_out() -> None:
    found = pair_values(values=np.array([0.3, -0.15, 0.1, 0.25]), standard_errors=np.full(4, 0.1))
    [axes] = pair_network(found, 2).axes
    assert set(drawn_lines(axes)) == {(0.8, to_rgba(UNSURE), False)}
    legend = axes.get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["tied across 0"]
    assert "2 more pairs are tied with the last" in legend.get_title().get_text()
    exact = pair_values(values=np.array([0.308, -0.2, 0.1, 0.31]), standard_errors=np.zeros(4))
    [axes] = pair_network(exact, 1).axes
    assert "1 more pairs are tied with the last" in axes.get_legend().get_title().get_text()


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


@pytest.mark.parametrize("samples", [1, LEAST_COUNT - 1, 50])
def test_weights_by_sample_and_their_mean(samples: int) -> None:
    weights = torch.rand(samples, 4, dtype=torch.float64).softmax(dim=1)
    names = ["unique_0", "unique_1", "synergy", "redundancy"]
    figure = expert_weights(weights, names, title="experts")
    left, right, _ = figure.axes
    [image] = left.get_images()
    np.testing.assert_array_equal(image.get_array(), weights)
    assert image.get_clim() == (0.0, 1.0)
    assert len(left.texts) == (4 * samples if samples <= 24 else 0)
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], weights.mean(dim=0))
    assert labels(left, "x") == labels(right, "x") == names
    what, _, which = right.get_title().partition("\n")
    assert what.startswith("one sample" if samples == 1 else f"mean of {samples} samples")
    unknown = 1 < samples < LEAST_COUNT
    assert which == FEW if unknown else all(names[k] in which for k in leading(weights.numpy()))
    assert right.get_ylabel() == "weight"


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


def test_sums_over_tokens_have_errors() -> None:
    """The second and the third differ by less than two of them."""
    values, errors = np.diag([1.0, 0.5, 0.4]), np.diag([0.01, 0.04, 0.04])
    axes = token_patch_map(values, errors=errors, image=np.zeros((4, 4)), grid=(1, 3)).axes[1]
    np.testing.assert_allclose(np.ravel(axes.get_images()[1].get_array()), [1.0, 0.45, 0.45])


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


def random_values(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    values, errors = draw.normal(size=count), draw.exponential(0.05, size=count)
    errors[draw.random(count) < 0.2] = 0.0
    values[: count // 4] = values[:1]
    return values, errors


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_connected_ties_are_drawn_alike(count: int) -> None:
    for seed in range(20):
        values, errors = random_values(count, seed)
        expected = list(range(count))
        for i, j in itertools.combinations(range(count), 2):
            if abs(values[i] - values[j]) <= 2 * math.hypot(errors[i], errors[j]):
                old, new = expected[j], expected[i]
                expected = [new if x == old else x for x in expected]
        found, drawn = groups(values, errors), alike(values, errors)
        for i, j in itertools.product(range(count), repeat=2):
            assert (found[i] == found[j]) == (expected[i] == expected[j])
            assert found[i] <= found[j] or values[i] < values[j]
            assert found[i] != found[j] or drawn[i] == drawn[j]
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


def test_no_pyplot_and_a_message_without_matplotlib() -> None:
    code = """
import sys
import numpy as np
from flmoe_kernels.core.figures import png_bytes
from flmoe_kernels.explain import token_patch_map
print("matplotlib" in sys.modules)
png_bytes(token_patch_map(np.eye(3), image=np.eye(3), grid=(1, 3)))
print("matplotlib.pyplot" in sys.modules)
for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
try:
    token_patch_map(np.eye(3))
except ModuleNotFoundError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    output = subprocess.check_output(words, env=environment, text=True)
    *loaded, message = output.splitlines()
    assert loaded == ["False", "False"]
    assert message.startswith("matplotlib")
    assert message.endswith("is not installed; run: pip install 'flmoe-kernels[demo]'")


PAIRS, DROPS = pair_values(), masking_drops()
FIGURES: Any = (drop_curve, expert_weights, pair_network, token_patch_map)
curve, bars, network, heat_map = FIGURES
THIRDS = np.full((2, 3), 1 / 3)
IMAGE = np.zeros((4, 4))
MISTAKES: list[tuple[Any, str]] = [
    (lambda: heat_map(np.zeros(3)), r"values: expected numbers \(La, Lb\)"),
    (lambda: heat_map(np.full((2, 3), NAN)), "values: expected at least one finite value"),
    (lambda: heat_map(VALUES, ["a"]), "tokens: expected 4 strings, .* got 1"),
    (lambda: heat_map(VALUES, patches=["a"]), "patches: expected 4 strings"),
    (lambda: heat_map(VALUES[:, :3], image=IMAGE), "grid: .* 3 is not a square number"),
    (lambda: heat_map(VALUES, image=IMAGE, grid=(1, 3)), r"grid: .* 4 patches, got \(1, 3\)"),
    (lambda: heat_map(VALUES, image=np.zeros(4)), r"image: expected \(H, W\)"),
    (lambda: heat_map(VALUES, image=IMAGE + 2), "image: expected floats"),
    (lambda: heat_map(VALUES, image=IMAGE.astype(int)), "image: expected uint8"),
    (lambda: heat_map(VALUES, image=IMAGE, weights=[1.0]), r"weights: .*\(4,\), got \(1,\)"),
    (lambda: heat_map(VALUES, errors=np.zeros(4)), r"errors: expected numbers \(La, Lb\)"),
    (lambda: heat_map(VALUES, errors=np.zeros((4, 3))), r"errors: .* shape \(4, 4\) of values"),
    (lambda: heat_map(VALUES, errors=VALUES), "errors: expected numbers from 0, got -2"),
    (lambda: network(pair_values(values=np.full(4, NAN))), "found: expected a pair with a"),
    (lambda: network(PAIRS, 0), "n: expected an int from 1"),
    (lambda: network(PAIRS, names=["a"]), "names: expected 2, .* got 1"),
    (lambda: network(PAIRS, tokens=[["a"], None]), r"tokens\[0\]: expected 3"),
    (lambda: bars(np.full((2, 2), NAN), "ab"), "weights: expected finite"),
    (lambda: bars([[1.0, 2.0], [3.0]], "ab"), r"weights: expected numbers \(S, E\), such"),
    (lambda: bars(np.zeros((2, 2)), "abc"), "names: expected 2, .* got 3"),
    (lambda: network({"SII": PAIRS}), r"TypeError: found: .* got dict \(pass one of"),
    (lambda: network([{"SII": PAIRS}]), "TypeError: found: expected a PairValues, got list$"),
    (lambda: network(DROPS), "TypeError: found: expected a PairValues, got MaskingDrops$"),
    (lambda: network(PAIRS, names=3), "TypeError: names: expected a sequence, got int"),
    (lambda: network(PAIRS, tokens=3), "TypeError: tokens: expected a sequence, got int"),
    (lambda: network(PAIRS, tokens=[3, None]), r"TypeError: tokens\[0\]: .* sequence, got int"),
    (lambda: curve((DROPS, DROPS)), r"TypeError: drops: .* got tuple \(pass one of"),
    (lambda: heat_map(PAIRS), r"TypeError: values: .* PairValues.between\(0, 1\), got PairValues$"),
    (lambda: heat_map(VALUES, errors=PAIRS), "TypeError: errors: .* got PairValues$"),
    (lambda: heat_map(VALUES, image=PAIRS), "TypeError: image: expected .* got PairValues$"),
    (lambda: heat_map(VALUES, image=IMAGE, weights=PAIRS), "TypeError: weights: .* PairValues$"),
    (lambda: heat_map(VALUES, image=IMAGE, grid=2), "TypeError: grid: .* sequence, got int"),
    (lambda: heat_map(VALUES, 3), "TypeError: tokens: expected a sequence, got int"),
    (lambda: bars(DROPS, "ab"), "TypeError: weights: .* Attribution.weights, got MaskingDrops"),
    (lambda: bars(THIRDS, None), "TypeError: names: expected a sequence, got NoneType"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    assert_refused(call, message)
