"""Tables of speed in README.md and docs/benchmarks.md: python -m bench.table

Writes the tables of the files bench/results/NAME.json, NAME in PROCESSORS, into both pages, between the markers.
The files come from `pytest bench/ --full --benchmark-json=bench/results/NAME.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flmoe_kernels.core.files import write_whole
from flmoe_kernels.profile.cases import BOTH, FORWARD

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# The processor with the lower ratios comes first.
PROCESSORS = ("cascade_lake", "zen5")
PAGES = {"short": ROOT / "README.md", "long": ROOT / "docs" / "benchmarks.md"}
MARK, END_MARK = "<!-- begin: python -m bench.table -->", "<!-- end -->"
LAYER = ("mmimdb", "enrico", "mimic")
# Rows of the short table: title, and the cases of a cell.
SHORT = {
    "`InteractionMoE`, training step: mmimdb / enrico / mimic": [
        f"interaction_moe/{shape}/{BOTH}/float32" for shape in LAYER
    ],
    "`InteractionMoE`, inference: mmimdb / enrico / mimic": [
        f"interaction_moe/{shape}/{FORWARD}/float32" for shape in LAYER
    ],
    "`routed_mlp`, forward and backward: 4 / 16 experts": [
        f"routed_mlp/routed_small_e{count}/{BOTH}/float32/bias" for count in (4, 16)
    ],
    "`pair_moe`, forward and backward: no reduction / pooled": [
        f"pair_moe/pair_base/{BOTH}/float32/{reduce}" for reduce in ("none", "pool")
    ],
    "`expert_attention` with dropout, forward and backward": [
        f"expert_attention/mmimdb/{BOTH}/float32/dropout"
    ],
}
HEADINGS = (
    "| operator, shape | | this package | of the roofline | peak memory | "
    "peers: ratio (interval of the median), peak |\n|---|---|--:|--:|--:|---|\n"
)


def load(name: str) -> dict[str, Any]:
    """Environment and comparisons of a result file of pytest-benchmark."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    return {
        "environment": result["machine_info"]["flmoe_kernels"],
        "comparisons": [row for row in rows if "ratio" in row],
    }


def short_table(contents: Sequence[Mapping[str, Any]]) -> str:
    """Table of the ratios to the fastest peer of each case, one column per processor."""
    heads = [_where(content["environment"]) for content in contents]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for what, cases in SHORT.items():
        cells = []
        for content in contents:
            ratios = [
                min(row["ratio"]["median"] for row in content["comparisons"] if row["case"] == case)
                for case in cases
            ]
            cells.append(" / ".join(f"{ratio:.2f}x" for ratio in ratios))
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _where(facts: Mapping[str, Any]) -> str:
    commit = facts["commit"] if " " in facts["commit"] else f"commit {facts['commit']}"
    cpu = facts["cpu"].replace("(family 26, model 2)", "(Zen 5)")
    return f"{cpu}, {commit}"


def long_table(content: Mapping[str, Any]) -> str:
    facts = content["environment"]
    where = facts["device"]
    if where == facts["cpu"]:
        where = f"{facts['threads']} threads of {where}, {facts['instruction_set']}"
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in content["comparisons"]:
        by_case.setdefault(row["case"], []).append(row)
    dtypes = {case.split("/")[3]: None for case in by_case}
    head = f"{where}, {' and '.join(dtypes)}, torch {facts['torch']}, commit {facts['commit']}.\n\n"
    return head + HEADINGS + "".join(_line(case, by_case[case]) for case in by_case)


def _line(case: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    operator, shape, phase, _, *variant = case.split("/")
    first = comparisons[0]
    peers = [
        f"{row['peer']} **{row['ratio']['median']:.2f}x** ({row['ratio']['low']:.2f} to "
        f"{row['ratio']['high']:.2f}){_peak(row, row['peer'], ', ')}"
        for row in comparisons
    ]
    share = first["share_of_roofline"]
    cells = [
        ", ".join([operator, shape, *variant]),
        "training step" if phase == BOTH else phase,
        f"{_digits(1e3 * first['seconds']['median'])} ms",
        "" if share is None else f"{share:.0%}",
        _peak(first, first["ours"]),
        "; ".join(peers),
    ]
    return f"| {' | '.join(cells)} |\n"


def _digits(value: float) -> str:
    """Format a value with at least three digits and without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _peak(row: Mapping[str, Any], name: str, before: str = "") -> str:
    peak = (row["peaks"] or {}).get(name)
    return "" if peak is None else f"{before}{peak / 2**20:.0f} MiB"


def tables() -> dict[str, str]:
    """Both pages' tables, generated from the result files."""
    contents = [load(name) for name in PROCESSORS]
    timed = [content for content in contents if "seconds" in content["comparisons"][0]]
    return {"short": short_table(contents), "long": "\n".join(map(long_table, timed))}


def main() -> None:
    for key, text in tables().items():
        page = PAGES[key]
        before, _, rest = page.read_text(encoding="utf-8").partition(MARK)
        after = rest.partition(END_MARK)[2]
        write_whole(page, f"{before}{MARK}\n{text}{END_MARK}{after}")


if __name__ == "__main__":
    main()
