"""Tables of speed in README.md and docs/benchmarks.md: python -m bench.table

Writes the tables of the files bench/results/NAME.json, NAME in PROCESSORS, into both pages, between the markers.
The files come from `pytest bench/ --full -m table --benchmark-json=bench/results/NAME.json`.
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
# The processor with the lower ratios comes first; names without a file have no column.
PROCESSORS = ("cascade_lake_avx2", "zen5_avx2", "cascade_lake", "zen5")
PAGES = {"short": ROOT / "README.md", "long": ROOT / "docs" / "benchmarks.md"}
MARK, END_MARK = "<!-- begin: python -m bench.table -->", "<!-- end -->"
_LAYERS = ("mmimdb", "enrico", "mimic", "tokens_24")
_SIZES = ("routed_small_e4", "routed_small_e16")


def _row(operator: str, shapes: Sequence[str], phase: str, variant: str = "") -> list[str]:
    return [f"{operator}/{shape}/{phase}/float32{variant}" for shape in shapes]


def _pairs(phase: str) -> list[str]:
    return [f"pair_moe/pair_base/{phase}/float32/{reduce}" for reduce in ("none", "pool")]


# Rows of the short table: title, and the cases of a cell.
SHORT = {
    "`InteractionMoE`, training step: mmimdb / enrico / mimic / tokens_24": _row(
        "interaction_moe", _LAYERS, BOTH
    ),
    "`InteractionMoE`, inference: mmimdb / enrico / mimic / tokens_24": _row(
        "interaction_moe", _LAYERS, FORWARD
    ),
    "`routed_mlp`, forward and backward: 4 / 16 experts": _row("routed_mlp", _SIZES, BOTH, "/bias"),
    "`pair_moe`, forward and backward: no reduction / pooled": _pairs(BOTH),
    "`expert_attention` with dropout, forward and backward": _row(
        "expert_attention", ("mmimdb",), BOTH, "/dropout"
    ),
}
_RATE, _BFLOAT16 = "/FLOP rate, one thread", ("mmimdb", "enrico")
# More rows at the start of the long table.
MORE = {
    "`routed_mlp`, forward: 4 / 16 experts": _row("routed_mlp", _SIZES, FORWARD, "/bias"),
    "`pair_moe`, forward: no reduction / pooled": _pairs(FORWARD),
    "`expert_attention` with dropout, forward": _row(
        "expert_attention", ("mmimdb",), FORWARD, "/dropout"
    ),
    "executed FLOP per second relative to torch.mm, one thread, enrico: inference / training step": [
        case
        for phase in (FORWARD, BOTH)
        for case in _row("interaction_moe", ("enrico",), phase, _RATE)
    ],
    "`InteractionMoE` in bfloat16 relative to its float32, training step: mmimdb / enrico": [
        f"interaction_moe/{shape}/{BOTH}/bfloat16" for shape in _BFLOAT16
    ],
    "`InteractionMoE` in bfloat16 relative to its float32, inference: mmimdb / enrico": [
        f"interaction_moe/{shape}/{FORWARD}/bfloat16" for shape in _BFLOAT16
    ],
    "`expert_linear` relative to torch.mm, one thread: in cache / out of L2": [
        f"expert_linear/96 x 256 x 256/{FORWARD}/float32/in cache",
        f"expert_linear/1680 x 256 x 1024/{FORWARD}/float32/out of L2",
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


def fastest_ratios(content: Mapping[str, Any]) -> dict[str, float]:
    """The ratio to the fastest peer of each case."""
    ratios: dict[str, float] = {}
    for row in content["comparisons"]:
        ratio = row["ratio"]["median"]
        ratios[row["case"]] = min(ratio, ratios.get(row["case"], ratio))
    return ratios


def short_table(
    contents: Sequence[Mapping[str, Any]], rows: Mapping[str, Sequence[str]] = SHORT
) -> str:
    """Table of the ratios to the fastest peer of each case, one column per processor; "-": not measured."""
    heads = [_where(content["environment"]) for content in contents]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for what, cases in rows.items():
        cells = []
        for ratios in map(fastest_ratios, contents):
            found = [f"{ratios[case]:.2f}x" if case in ratios else "-" for case in cases]
            cells.append(" / ".join(found) if set(found) != {"-"} else "-")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def processor(facts: Mapping[str, Any]) -> str:
    cpu = facts["cpu"].replace("(family 26, model 2)", "(Zen 5)")
    return f"{cpu}, {facts['instruction_set']}"


def _where(facts: Mapping[str, Any]) -> str:
    commit = facts["commit"] if " " in facts["commit"] else f"commit {facts['commit']}"
    return f"{processor(facts)}, {commit}"


def long_table(content: Mapping[str, Any]) -> str:
    facts = content["environment"]
    where = facts["device"]
    if where == facts["cpu"]:
        where = f"{facts['threads']} threads of {where}, {facts['instruction_set']}"
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in content["comparisons"]:
        by_case.setdefault(row["case"], []).append(row)
    head = f"{where}, torch {facts['torch']}, commit {facts['commit']}.\n\n"
    return head + HEADINGS + "".join(_line(case, by_case[case]) for case in by_case)


def _line(case: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    operator, shape, phase, dtype, *variant = case.split("/")
    first = comparisons[0]
    peers = [
        f"{row['peer']} **{row['ratio']['median']:.2f}x** ({row['ratio']['low']:.2f} to "
        f"{row['ratio']['high']:.2f}){_peak(row, row['peer'], ', ')}"
        for row in comparisons
    ]
    share = first.get("share_of_roofline")
    cells = [
        ", ".join([operator, shape, *([] if dtype == "float32" else [dtype]), *variant]),
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
    peak = (row.get("peaks") or {}).get(name)
    return "" if peak is None else f"{before}{peak / 2**20:.0f} MiB"


def tables() -> dict[str, str]:
    """Both pages' tables, generated from the result files."""
    contents = [load(name) for name in PROCESSORS if (RESULTS / f"{name}.json").is_file()]
    timed = [content for content in contents if "seconds" in content["comparisons"][0]]
    long = [short_table(contents, SHORT | MORE), *map(long_table, timed)]
    return {"short": short_table(contents), "long": "\n".join(long)}


def main() -> None:
    for key, text in tables().items():
        page = PAGES[key]
        before, _, rest = page.read_text(encoding="utf-8").partition(MARK)
        after = rest.partition(END_MARK)[2]
        write_whole(page, f"{before}{MARK}\n{text}{END_MARK}{after}")


if __name__ == "__main__":
    main()
