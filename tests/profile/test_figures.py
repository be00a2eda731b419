"""Tests of the profiler's figure: logarithmic axes, ceilings, points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from flmoe_kernels.profile.figures import Point, Roof, roofline_figure

OURS = Point("pair_moe/x, cpu", flop=8e9, bytes=1e9, seconds=1.0, low=0.9, high=1.25, ours=True)
PEER = Point("pair_moe/x, reference", 8e9, 1e9, seconds=4.0, low=3.0, high=5.0, ours=False)
LOW = Point("cost $5", 1e6, 4e6, seconds=0.1, low=0.09, high=0.11, ours=True)
ROOF = Roof({"float32": 1e11, "bfloat16": 4e11}, copy=2e10)


def drawn(axes: Any) -> dict[str, Any]:
    """Labelled lines by label: ceilings and markers of points."""
    found = {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}
    return found | {bars.get_label(): bars[0] for bars in axes.containers}


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
