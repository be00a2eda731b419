"""Figure of the metric's drop by budget, for identified and random tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flmoe_kernels.core.figures import make_figure
from flmoe_kernels.explain.attribution.targets import LOGIT, PROB
from flmoe_kernels.explain.masking.drops import COMPREHENSIVENESS, KINDS, MaskingDrops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRIC = {PROB: "probability", "log_prob": "log-probability (nats)", LOGIT: "logit"}
_UNIT = {
    "percent": "tokens of each modality (%)",
    "tokens": "budget (tokens)",
}


def drop_curve(drops: MaskingDrops, metric: str = PROB, *, title: str = "") -> Figure:
    """Plot comprehensiveness and sufficiency over the budgets, for identified and random tokens.

    Lines are means over samples; bars are one standard error over samples, if there are several; the band is one
    standard deviation over the random repeats on both sides. AOPC, the mean over budgets, is in the legend. The
    panels have different scales, because masking a few tokens and masking all others differ in size.

    Args:
        drops: result of faithfulness or pair_masking.
        metric: a name in drops.metrics.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the metric was not measured.
    """
    curves = {kind: drops.curve(kind, metric) for kind in KINDS}
    figure = make_figure(10.5, 4.0)
    panels = figure.subplots(1, 2)
    for axes, (kind, curve) in zip(panels, curves.items(), strict=True):
        _panel(axes, drops, kind, metric, *(x.cpu().numpy() for x in curve[:4]))
    panels[0].set_ylabel(f"drop of the target's {_METRIC[metric]}")
    if title:
        figure.suptitle(title)
    return figure


def _panel(
    axes: Axes,
    drops: MaskingDrops,
    kind: str,
    metric: str,
    identified: np.ndarray,
    error: np.ndarray,
    random: np.ndarray,
    spread: np.ndarray,
) -> None:
    aopc, x = drops.aopc(kind, metric), np.array(drops.budgets)
    bars = error if np.isfinite(error).all() else None
    axes.errorbar(
        x,
        identified,
        yerr=bars,
        color="black",
        marker="o",
        capsize=3,
        label=f"identified, AOPC {float(aopc.identified):.3g}",
        zorder=3,
    )
    if np.isfinite(random).any():
        if drops.random.shape[2] > 1:
            axes.fill_between(
                x, random - spread, random + spread, color="0.85", ec="0.6", label="± std"
            )
        axes.plot(
            x,
            random,
            color="0.35",
            ls="dashed",
            marker="s",
            mfc="white",
            label=f"random, AOPC {float(aopc.random):.3g}",
            zorder=2,
        )
    axes.axhline(0.0, color="0.5", lw=0.8, zorder=1)
    axes.set_xticks(x, [f"{budget:g}" for budget in drops.budgets])
    axes.set_xlabel(_UNIT[drops.unit])
    wanted = "high is good" if kind == COMPREHENSIVENESS else "low is good"
    what = "tokens masked" if kind == COMPREHENSIVENESS else "all other tokens masked"
    axes.set_title(f"{kind}: {what}; {wanted}", fontsize="medium")
    # Below the panel: bars and band leave no corner free.
    axes.legend(
        fontsize="small",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=3,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.6,
    )
