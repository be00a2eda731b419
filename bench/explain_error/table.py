"""Ratio of this package's error to that of the best peer: python -m bench.explain_error.table RESULTS LINES..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OWN = "flmoe_kernels"


def best_peers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each game and budget with results of this package and of a peer."""
    found = []
    for own in (row for row in rows if row["estimator"] == OWN):
        point = own["game"], own["budget"]
        others = [x for x in rows if x["estimator"] != OWN and (x["game"], x["budget"]) == point]
        if others:
            best = min(others, key=lambda x: x["error"])
            ratio = own["error"] / best["error"]
            found.append({"own": own, "best": best, "ratio": ratio})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| game | evaluations | error | best peer | its error | ratio | recall of 10 | its recall | s | its s |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for point in best_peers(rows):
        own, best = point["own"], point["best"]
        # Where the best peer is exact, or worse than zeros nearly are, the ratio says nothing.
        ratio = f"{point['ratio']:.2f}" if 1e-6 < best["error"] < 0.9 else "-"
        cells = (
            *(own["game"], own["budget"], f"{own['error']:.2g}"),
            *(best["estimator"], f"{best['error']:.2g}", ratio),
            *(f"{own['recall_10']:.2f}", f"{best['recall_10']:.2f}"),
            *(f"{own['seconds']:.2g}", f"{best['seconds']:.2g}"),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    own = [row for row in rows if row.get("intervals")]
    covered, count = (sum(row[key] for row in own) for key in ("covered", "intervals"))
    return "\n".join(
        [*lines, "", f"Coverage of 95% intervals: {covered / max(count, 1):.3f} of {count}."]
    )


def main(results: Path, *lines: str) -> None:
    if lines:
        rows = [json.loads(x) for name in lines for x in Path(name).read_text().splitlines()]
        body = ",\n".join(json.dumps(row) for row in rows)
        results.write_text(f'{{"settings": {{"shapiq": "1.8.0"}},\n"rows": [\n{body}\n]}}\n')
    print(table(json.loads(results.read_text())["rows"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
