"""Tests of the profiler's figure: logarithmic axes, ceilings, points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from flmoe_kernels.profile.ceilings import Ceilings
from flmoe_kernels.profile.costs import Cost
from flmoe_kernels.profile.output import roofline_figure
from flmoe_kernels.profile.profiles import Profile, Subject
from flmoe_kernels.profile.stages import Breakdown
from flmoe_kernels.profile.timing import Spread

ROOF = Ceilings("cpu", {"float32": 1e11, "bfloat16": 4e11}, bytes_per_second=2e10)


def profile(contestant: str, kind: str, cost: Cost, low: float, median: float, high: float) -> Any:
    spread = Spread(median, low, high, 0.95, low, high, 6, 30)
    call = ("pair_moe/$5", contestant, kind, "1", torch.float32, "cpu", cost, lambda: None, None)
    return Profile(Subject(*call), spread, ROOF, Breakdown(1.0, (), None, None), None, None)


OURS = profile("cpu", "ours", Cost(8 * 10**9, 10**9), 0.9, 1.0, 1.25)
PEER = profile("reference", "peer", Cost(8 * 10**9, 10**9), 3.0, 4.0, 5.0)
LOW = profile("low", "ours", Cost(10**6, 4 * 10**6), 0.09, 0.1, 0.11)


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
        np.testing.assert_allclose(y, np.minimum(top, x * ROOF.bytes_per_second))
        # The figure shows both sides of the knee.
        assert x.min() < top / ROOF.bytes_per_second < x.max()
        assert y.max() == top
    for one, filled in ((OURS, True), (PEER, False)):
        name = rf"pair_moe/\$5, {one.subject.contestant}"
        [marker] = [line for label, line in lines.items() if label.startswith(name)]
        assert marker.get_xdata() == [8.0]
        assert marker.get_ydata() == [8e9 / one.spread.median]
        assert (marker.get_markerfacecolor() == "black") == filled
