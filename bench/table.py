"""The README's table of speed: python -m bench.table [RUN.json ...]

Keeps the comparisons of `pytest bench/ --full --benchmark-json=RUN.json` in bench/results/named.json and writes
the table between its marks in README.md. Without files it writes the table of bench/results/named.json again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import rows
from flmoe_kernels.core.files import write_whole
from flmoe_kernels.profile.cases import BOTH

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "named.json"
MARK, END_MARK = "<!-- begin: python -m bench.table -->", "<!-- end -->"
HEADINGS = (
    "| operator, shape | | this package | of the bound | peak | "
    "peers: ratio (interval of the median), peak |\n|---|---|--:|--:|--:|---|\n"
)


def gather(paths: Sequence[Path]) -> dict[str, Any]:
    """Environment and comparisons of results of pytest-benchmark."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found = []
    for result in results:
        for benchmark in result["benchmarks"]:
            facts = benchmark["extra_info"]
            if "ratio" in facts:
                found.append({key: facts.get(key) for key in KEPT})
    return {"environment": results[0]["machine_info"]["flmoe_kernels"], "comparisons": found}


KEPT = (
    *("case", "ours", "peer", "peer_version", "device", "threads", "clock", "seconds"),
    *("peer_seconds", "ratio", "share_of_roofline", "binds", "peaks"),
)


def markdown(content: Mapping[str, Any]) -> str:
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


def _line(case: str, found: Sequence[Mapping[str, Any]]) -> str:
    operator, shape, phase, _, *variant = case.split("/")
    first = found[0]
    peers = [
        f"{row['peer']} **{row['ratio']['median']:.2f}x** ({row['ratio']['low']:.2f} to "
        f"{row['ratio']['high']:.2f}){_peak(row, row['peer'], ', ')}"
        for row in found
    ]
    cells = [
        ", ".join([operator, shape, *variant]),
        "training step" if phase == BOTH else phase,
        f"{_digits(1e3 * first['seconds']['median'])} ms",
        f"{first['share_of_roofline']:.0%}",
        _peak(first, first["ours"]),
        "; ".join(peers),
    ]
    return f"| {' | '.join(cells)} |\n"


def _digits(value: float) -> str:
    """At least three digits, never an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _peak(row: Mapping[str, Any], name: str, before: str = "") -> str:
    peak = (row["peaks"] or {}).get(name)
    return "" if peak is None else f"{before}{peak / 2**20:.0f} MiB"


def main(arguments: Sequence[str]) -> None:
    if arguments:
        rows.save(RESULTS, gather([Path(name) for name in arguments]))
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = ROOT / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARK)
    after = rest.partition(END_MARK)[2]
    write_whole(page, f"{before}{MARK}\n{markdown(content)}{END_MARK}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
