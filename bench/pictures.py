"""Pictures of docs/pictures: python -m bench.pictures

The picture of an explanation shows results of the demo: run `make demo` first.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from bench import table
from examples.digits.figure import draw_pairs
from flmoe_kernels.core.figures import make_figure, png_bytes
from flmoe_kernels.core.files import write_whole
from flmoe_kernels.profile.cases import BOTH, FORWARD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = table.ROOT
OUT = ROOT / "docs" / "pictures"
BLUES = ("#9fa8da", "#5c6bc0", "#283593")


def house() -> Figure:
    """The packages with their operators and layers, and the direction of imports."""

    def folders(name: str) -> str:
        return ", ".join(
            sorted(file.parent.name for file in ROOT.glob(f"flmoe_kernels/{name}/*/__init__.py"))
        )

    rows = (
        {"cli": "python -m flmoe_kernels"},
        {
            "explain": "attribution, interactions, figures",
            "profile": "timing, roofline, regression check",
        },
        {"published": "swap, checkpoint files"},
        {"layers": folders("layers")},
        {"ops": folders("ops")},
        {"core": "choice of backends, validation, native module, launches of kernels"},
        {"csrc": "C++ for CPUs, CUDA C++"},
    )
    figure = make_figure(8.4, 4.6)
    axes = figure.add_subplot(xlim=(0, 1), ylim=(len(rows) - 0.2, -0.05))
    axes.axis("off")
    for y, row in enumerate(rows):
        for x, (name, content) in enumerate(row.items()):
            left, width = x / len(row), 1 / len(row)
            axes.barh(y, width - 0.01, 0.62, left, color="#e8eaf6", align="edge")
            middle = left + width / 2
            axes.text(middle, y + 0.2, name, weight="bold", ha="center", va="center")
            axes.text(middle, y + 0.43, content, size=8.5, ha="center", va="center")
            if y + 1 < len(rows):
                arrow = {"arrowstyle": "-|>", "color": BLUES[2]}
                axes.annotate("", (middle, y + 1), (middle, y + 0.62), arrowprops=arrow)
    return figure


def speed() -> Figure:
    """Ratio to the fastest peer, by shape and processor."""
    contents = [table.load(name) for name in ("zen5_avx2", "cascade_lake", "zen5")]
    operators = (
        ("interaction_moe", ("mmimdb", "enrico", "mimic", "tokens_24"), ""),
        ("expert_attention", ("mmimdb",), "/dropout"),
        ("routed_mlp", ("routed_small_e4", "routed_small_e16"), "/bias"),
        ("pair_moe", ("pair_base",), "/pool"),
    )
    figure = make_figure(8.4, 5.6)
    for axes, phase, title in zip(
        figure.subplots(1, 2, sharey=True),
        (BOTH, FORWARD),
        ("training step, or forward and backward", "inference, or forward"),
        strict=True,
    ):
        cases = [
            f"{operator}/{shape}/{phase}/float32{variant}"
            for operator, shapes, variant in operators
            for shape in shapes
        ]
        for k, content in enumerate(contents):
            ratios = table.fastest_ratios(content)
            places = [y + 0.27 * (k - 1) for y in range(len(cases))]
            widths = [ratios.get(case, 0.0) for case in cases]
            label = table.processor(content["environment"])
            bars = axes.barh(places, widths, 0.27, color=BLUES[k], label=label)
            labels = [f"{width:.2f}" if width else "-" for width in widths]
            axes.bar_label(bars, labels, size=7, padding=2)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(title, size=9)
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(cases)), ["\n".join(case.split("/")[:2]) for case in cases])
    axes.invert_yaxis()
    figure.supxlabel("time of the fastest other implementation / time of this package", size=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def explanation() -> Figure:
    """The explanation of one sample of the demo's task that needs both images."""
    results = json.loads((ROOT / "demo_out" / "demo.json").read_text(encoding="utf-8"))
    return draw_pairs("synergy", results["token_pair_layer"]["synergy"]["first_sample"])


def main() -> None:
    for draw, dpi in ((house, 110), (speed, 110), (explanation, 80)):
        write_whole(OUT / f"{draw.__name__}.png", png_bytes(draw(), dpi))


if __name__ == "__main__":
    main()
