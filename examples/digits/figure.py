"""The results as two pictures that read in black and white."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .data import EXPERTS, GRID, NUM_TOKENS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS: dict[str, dict[str, Any]] = {
    "reference": {"color": "0.85", "edgecolor": "black", "hatch": "///"},
    "fast": {"color": "0.35", "edgecolor": "black"},
}
BAR = 0.38


def draw_results(results: Mapping[str, Any]) -> Figure:
    """Shares of the experts, accuracies, times and memory of both layers."""
    # Figure itself, not pyplot: no window system is looked for and no global state changes.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    tasks, times = results["tasks"], results["seconds"]
    _shares(panels[0][0], results["token_pair_layer"])

    accuracy = {
        "reference": [task["accuracy_before"] for task in tasks.values()],
        "fast": [task["accuracy_after"] for task in tasks.values()],
    }
    _bars(panels[0][1], accuracy, list(tasks), "{:.1%}", "test accuracy")
    for place, task in enumerate(tasks.values()):
        label = "chance" if place == 0 else ""
        panels[0][1].hlines(
            task["chance"], place - 0.45, place + 0.45, "black", "dotted", label=label
        )
    panels[0][1].set_title("Accuracy before and after the swap")

    milliseconds = {layer: [t[layer] * 1e3 for t in times.values()] for layer in BARS}
    names = [f"{name}\n{t['speed_up']:.1f}x" for name, t in times.items()]
    _bars(panels[1][0], milliseconds, names, "{:.1f}", "milliseconds")
    panels[1][0].set_title(f"Time, batch {results['settings']['batch_size']} (median)")

    peaks = {
        layer: [(peak or 0) / 2**20] for layer, peak in results["peak_memory_of_training"].items()
    }
    _bars(panels[1][1], peaks, ["training"], "{:.1f}", "MiB")
    panels[1][1].set_xlim(-1.0, 1.0)
    panels[1][1].set_title("Peak memory of training")
    for panel in (panels[0][1], *panels[1]):
        panel.legend(loc="upper right", ncols=3)
    return figure


def _shares(axes: Axes, tasks: Mapping[str, Any]) -> None:
    shares = [list(task["share"].values()) for task in tasks.values()]
    axes.imshow(shares, cmap="Greys", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(EXPERTS)), EXPERTS)
    axes.set_yticks(range(len(tasks)), list(tasks))
    for row, task in enumerate(tasks.values()):
        for column, share in enumerate(shares[row]):
            star = "*" if EXPERTS[column] == task["most_relied_on"] else ""
            ink = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.0%}{star}", ha="center", va="center", color=ink)
        left = EXPERTS.index(task["expected_expert"]) - 0.46
        _rectangle(axes, left, row - 0.46, 0.92, 0.92, fill=False, lw=3, ec="black")
    axes.set_xlabel("expert")
    axes.set_ylabel("task")
    axes.set_title("Token pairs: share of each expert\nframe: by construction, *: largest")


def _bars(
    axes: Axes, values: Mapping[str, list[float]], names: list[str], form: str, unit: str
) -> None:
    """Bars of both layers side by side, their values above them."""
    for shift, (layer, heights) in zip((-BAR / 2, BAR / 2), values.items(), strict=True):
        places = [place + shift for place in range(len(heights))]
        bars = axes.bar(places, heights, BAR, label=layer, **BARS[layer])
        axes.bar_label(bars, [form.format(height) for height in heights], padding=2, fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0.0, 1.25 * max(height for heights in values.values() for height in heights))
    axes.set_ylabel(unit)


def draw_pairs(results: Mapping[str, Any]) -> Figure:
    """A row for each task: both images with the patches' values, and the pairs of patches."""
    from matplotlib.figure import Figure

    layers = results["token_pair_layer"]
    figure = Figure(figsize=(10.5, 3.2 * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), 3, squeeze=False, width_ratios=(1, 1, 1.3))
    for row, (name, layer) in zip(panels, layers.items(), strict=True):
        sample = layer["first_sample"]
        for m in range(2):
            _patches(row[m], sample, m)
        a, b = sample["digits"]
        row[0].set_ylabel(name)
        row[0].set_title(f"label {sample['label']}, answer {sample['guess']}; A shows {a}")
        row[1].set_title(f"B shows {b}")
        _pairs(row[2], sample)
    figure.suptitle(
        "Exact explanations of the true class's logit. On the images: Shapley values of patches, in percent of\n"
        "the sum of |values|. Right: interaction indices of pairs of patches. Hatched: padding, which has none."
    )
    return figure


def _patches(axes: Axes, sample: Mapping[str, Any], m: int) -> None:
    """The image, and on every patch its value in percent of the sum of |values|."""
    image = sample["images"][m]
    axes.imshow(image, cmap="Greys", vmin=0.0, vmax=1.6)
    whole = sum(abs(value) for values in sample["patches"] for value in values) or 1.0
    side = len(image) / GRID
    for place, value in enumerate(sample["patches"][m]):
        valid = sample["valid"][m][place]
        left, top = (side * cell - 0.5 for cell in (place % GRID, place // GRID))
        if not valid:
            _hatch(axes, left, top, side, side)
        percent = round(100 * value / whole)
        axes.text(
            left + side / 2,
            top + side / 2,
            f"{percent:d}" if valid else "-",
            ha="center",
            va="center",
            weight="bold" if abs(percent) >= 5 else "normal",
            bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1.0},
        )
    axes.set_xticks([])
    axes.set_yticks([])


def _pairs(axes: Axes, sample: Mapping[str, Any]) -> None:
    """Greys around 0: darker is for the class, lighter against it."""
    size = max(abs(value) for row in sample["pairs"] for value in row) or 1.0
    image = axes.imshow(sample["pairs"], cmap="Greys", vmin=-size, vmax=size)
    rows, columns = sample["valid"]
    for i in range(NUM_TOKENS):
        if not rows[i]:
            _hatch(axes, -0.5, i - 0.5, NUM_TOKENS, 1)
        if not columns[i]:
            _hatch(axes, i - 0.5, -0.5, 1, NUM_TOKENS)
    axes.set_xticks(range(0, NUM_TOKENS, 5))
    axes.set_yticks(range(0, NUM_TOKENS, 5))
    axes.set_xlabel("patch of B")
    axes.set_ylabel("patch of A")
    axes.set_title("pairs of patches, all experts")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, ticks=[-size, 0.0, size])
    bar.ax.set_yticklabels([f"{-size:.2g} against", "0", f"{size:.2g} for the class"])


def _hatch(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    _rectangle(axes, left, top, width, height, fc="white", ec="grey", hatch="////", lw=0.0)


def _rectangle(
    axes: Axes, left: float, top: float, width: float, height: float, **style: Any
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, height, **style))
