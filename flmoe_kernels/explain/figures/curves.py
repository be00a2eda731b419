"""Figure of the metric's drop by budget, for identified and random tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_kernels.core.figures import make_figure
from flmoe_kernels.explain.attribution.targets import LOGIT, PROB
from flmoe_kernels.explain.masking.drops import COMPREHENSIVENESS, KINDS, MaskingDrops
from flmoe_kernels.explain.reliability import LEAST_COUNT, TIE_ERRORS

from .canvas import require_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BETTER, WORSE = "better than random tokens", "worse than random tokens"
UNCLEAR = "not distinguishable from random tokens"
UNKNOWN = "standard error unknown"
METRIC_NAMES = {PROB: "probability", "log_prob": "log-probability (nats)", LOGIT: "logit"}
_IDENTIFIED: Any = {"color": "black", "marker": "o", "capsize": 3, "zorder": 3}
_RANDOM: Any = {"color": "0.35", "ls": "dashed", "marker": "s", "mfc": "white", "zorder": 2}
# Below the panel: bars and band leave no corner free.
_LEGEND: Any = {"fontsize": "small", "loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
_LEGEND |= {"ncols": 2, "frameon": False, "columnspacing": 1.2, "handlelength": 1.6}
_UNIT = {"percent": "tokens of each modality (%)", "tokens": "budget (tokens)"}


def drop_curve(drops: MaskingDrops, metric: str = PROB, *, title: str = "") -> Figure:
    """Plot comprehensiveness and sufficiency over the budgets, for identified and random tokens.

    Lines are means over samples; bars are two standard errors over samples; the band is two standard deviations
    over the random repeats on both sides. AOPC, the mean over budgets, is in the legend, and above the panel
    whether it differs from that of random tokens, see `compare`. For fewer than 16 samples the title states that
    the standard error is unknown. The panels have different scales, both with 0, because masking a few tokens and
    masking all others differ in size.

    Args:
        drops: result of faithfulness or pair_masking.
        metric: a name in drops.metrics.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: not a MaskingDrops.
        ValueError: the metric was not measured.
    """
    require_result("drops", drops, MaskingDrops)
    # One above the other, so that the figure is readable on a narrow screen.
    figure = make_figure(4.6, 8.4)
    panels = figure.subplots(2, 1)
    for axes, kind in zip(panels, KINDS, strict=True):
        _panel(axes, drops, kind, metric)
        axes.set_ylabel(f"drop of the target's {METRIC_NAMES[metric]}")
    if title:
        figure.suptitle(title)
    return figure


def compare(drops: MaskingDrops, kind: str, metric: str = PROB) -> str:
    """State whether identified tokens are better than random ones by AOPC; "" without random tokens.

    The gap counts as uncertain within two standard errors. Its error has two parts: the standard error over
    samples of the difference from the mean of the random sets, unknown for fewer than LEAST_COUNT samples; and the
    standard deviation over repeats, if there are several, since the identified set is to differ from single random
    sets.
    """
    repeats, count = drops.random.shape[2], int((drops.maskable > 0).sum())
    if not (repeats and count):
        return ""
    if count < LEAST_COUNT:
        return UNKNOWN
    aopc = drops.aopc(kind, metric)
    spread = float(aopc.random_std) if repeats > 1 else 0.0
    gap, error = float(aopc.gap), float(aopc.gap_error)
    if not abs(gap) > TIE_ERRORS * math.hypot(error, spread):
        return UNCLEAR
    return BETTER if gap > 0 else WORSE


def _panel(axes: Axes, drops: MaskingDrops, kind: str, metric: str) -> None:
    curve = drops.curve(kind, metric)
    identified, error, random, spread = (x.cpu().numpy() for x in curve[:4])
    aopc, x = drops.aopc(kind, metric), np.array(drops.budgets)
    bars = TIE_ERRORS * error if np.isfinite(error).all() else None
    names = [f"{of}, AOPC {float(getattr(aopc, of)):.3g}" for of in ("identified", "random")]
    axes.errorbar(x, identified, yerr=bars, label=names[0], **_IDENTIFIED)
    if np.isfinite(random).any():
        if drops.random.shape[2] > 1:
            low, high = random - TIE_ERRORS * spread, random + TIE_ERRORS * spread
            axes.fill_between(x, low, high, color="0.85", ec="0.6", label="± 2 std")
        axes.plot(x, random, label=names[1], **_RANDOM)
    axes.axhline(0.0, color="0.5", lw=0.8, zorder=1)
    axes.set_xticks(x, [f"{budget:g}" for budget in drops.budgets])
    axes.set_xlabel(_UNIT[drops.unit])
    wanted = "high is good" if kind == COMPREHENSIVENESS else "low is good"
    what = "tokens masked" if kind == COMPREHENSIVENESS else "all other tokens masked"
    verdict = compare(drops, kind, metric) or ("" if bars is not None else UNKNOWN)
    lines = [f"{kind}: {what}", wanted, verdict]
    axes.set_title("\n".join(line for line in lines if line), fontsize="medium")
    axes.legend(**_LEGEND)
