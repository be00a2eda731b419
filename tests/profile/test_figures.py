"""Tests of the profiler's figures: logarithmic axes, legible without colour, no global changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib

from flmoe_kernels.core.figures import png_bytes
from flmoe_kernels.profile.figures import (
    LengthPoint,
    Point,
    Roof,
    length_figure,
    roofline_figure,
)

OURS = Point("pair_moe/x, cpu", flop=8e9, bytes=1e9, seconds=1.0, low=0.9, high=1.25, ours=True)
PEER = Point("pair_moe/x, reference", 8e9, 1e9, seconds=4.0, low=3.0, high=5.0, ours=False)
LOW = Point("cost $5", 1e6, 4e6, seconds=0.1, low=0.09, high=0.11, ours=True)
ROOF = Roof({"float32": 1e11, "bfloat16": 4e11}, copy=2e10)


def drawn(axes: Any) -> dict[str, Any]:
    """Labelled lines by label: ceilings and markers of points."""
    found = {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}
    return found | {bars.get_label(): bars[0] for bars in axes.containers}


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_roofline_has_ceilings_and_points_on_logarithmic_axes() -> None:
    figure = roofline_figure([OURS, PEER, LOW], ROOF, title="of a machine")
    [axes] = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "FLOP per byte of inputs and outputs"
    assert axes.get_ylabel() == "FLOP/s"
    assert axes.get_title() == "of a machine"
    lines = drawn(axes)
    for dtype, top in ROOF.flops.items():
        [label] = [label for label in lines if label.startswith(dtype)]
        x, y = (np.asarray(values) for values in lines[label].get_data())
        np.testing.assert_allclose(y, np.minimum(top, x * ROOF.copy))
        # The figure shows both sides of the knee.
        assert x.min() < top / ROOF.copy < x.max()
        assert y.max() == top
    for point in (OURS, PEER):
        [marker] = [line for label, line in lines.items() if label.startswith(point.label)]
        assert marker.get_xdata() == [8.0]
        assert marker.get_ydata() == [point.flop / point.seconds]


@pytest.mark.parametrize(
    ("points", "roof", "message"),
    [
        ([], ROOF, "points: expected at least one"),
        ([dataclasses.replace(OURS, flop=0.0)], ROOF, "expected positive values"),
        ([OURS], Roof({}, 1e9), "roof: expected ceilings above 0"),
        ([OURS], Roof({"float32": 1e9}, 0.0), "roof: expected ceilings above 0"),
    ],
)
def test_roofline_refuses_invalid_points(points: Any, roof: Roof, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roofline_figure(points, roof)


def length_points() -> list[LengthPoint]:
    found = []
    for length in (128, 256, 1024):
        seconds = 1e-6 * length**1.5
        found.append(
            LengthPoint(length, "cpu", True, seconds, 0.9 * seconds, 1.2 * seconds, 2**20 * length)
        )
    slow = [
        LengthPoint(n, "reference", False, 1e-3 * n, 0.5e-3 * n, 2e-3 * n, n**2 * 2**20)
        for n in (128, 256)
    ]
    found += slow
    found.append(LengthPoint(1024, "reference", False, None, None, None, None, "12 GiB"))
    return found


def test_lengths_are_two_logarithmic_panels() -> None:
    figure = length_figure(length_points(), title="pairs")
    time, memory = figure.axes
    for axes in (time, memory):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xlabel() == "sequence length (tokens)"
        assert [t.get_text() for t in axes.get_xticklabels()] == ["128", "256", "1024"]
    assert time.get_ylabel() == "time of a call (s)"
    assert memory.get_ylabel() == "peak memory (MiB)"
    assert figure.get_suptitle() == "pairs"
    assert legend_of(time) == ["cpu", "reference (not at 1024: 12 GiB)"]
    lines = drawn(time)
    times = np.asarray(lines["cpu"].get_ydata(), dtype=float)
    np.testing.assert_allclose(times, 1e-6 * np.array([128, 256, 1024]) ** 1.5)
    [other] = [line for label, line in lines.items() if label.startswith("reference")]
    np.testing.assert_array_equal(other.get_xdata(), [128, 256])
    np.testing.assert_allclose(drawn(memory)["cpu"].get_ydata(), [128, 256, 1024])
    [segments] = time.containers[0][2]
    low, high = segments.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.9e-6 * 128**1.5, 1.2e-6 * 128**1.5))


@pytest.mark.parametrize(
    "make",
    [lambda: roofline_figure([OURS, PEER], ROOF), lambda: length_figure(length_points())],
)
def test_equal_inputs_give_equal_bytes_and_change_no_global_state(make: Any) -> None:
    before = dict(matplotlib.rcParams)
    first = png_bytes(make(), dpi=50)
    assert first.startswith(b"\x89PNG\r\n")
    assert png_bytes(make(), dpi=50) == first
    assert dict(matplotlib.rcParams) == before
