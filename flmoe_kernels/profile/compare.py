"""Comparison of two results: python -m flmoe_kernels.profile.compare BEFORE... --after AFTER...

Each side is one or more files of `pytest --benchmark-json` whose tests used `benchmark_against`. It compares
ratios to the peer in the same run, which a slower machine does not change. Each run gives a median with its
interval; the spread among the runs of a side counts as well. It prints a Markdown table. The exit code is 1 if
even the upper end of a change's interval is below --fail-below.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_Z = 1.96  # standard deviations to either side for 95%
Interval = tuple[float, float, float]  # median, low, high


@dataclass(frozen=True)
class Change:
    """A comparison before and after: ratios to the peer, and after over before with its 95% interval."""

    name: str
    before: Interval
    after: Interval
    speed: Interval

    def verdict(self, fail_below: float) -> str:
        _, low, high = self.speed
        if high < fail_below:
            return "SLOWER"
        if low > 1:
            return "faster"
        return "slower, no failure" if high < 1 else "same"


def load(paths: Iterable[Path]) -> dict[str, list[Interval]]:
    """Ratios of all runs by comparison.

    Raises:
        ValueError: a file is not a result of pytest-benchmark.
    """
    runs: dict[str, list[Interval]] = {}
    for path in paths:
        try:
            benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
            for benchmark in benchmarks:
                facts = benchmark["extra_info"]
                ratio = facts.get("ratio")
                if isinstance(ratio, dict):
                    key = f"{facts['case']} vs {facts['peer']}"
                    runs.setdefault(key, []).append((ratio["median"], ratio["low"], ratio["high"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a result of pytest --benchmark-json: {error}") from error
    return runs


def changes(
    before: Mapping[str, Sequence[Interval]], after: Mapping[str, Sequence[Interval]]
) -> list[Change]:
    """Return the changes of the comparisons that both sides have.

    Raises:
        ValueError: the sides have no comparison in common.
    """
    both = [name for name in before if name in after]
    if not both:
        raise ValueError("the two results have no comparison in common")
    pairs = {name: (pooled(before[name]), pooled(after[name])) for name in both}
    return [Change(name, old, new, quotient(new, old)) for name, (old, new) in pairs.items()]


def pooled(runs: Sequence[Interval]) -> Interval:
    """Mean of repeated runs on a logarithmic scale, with the variance within runs and among them."""
    logs = [math.log(value) for value, _, _ in runs]
    within = [(math.log(high / low) / (2 * _Z)) ** 2 for _, low, high in runs]
    variance = sum(within) / len(runs) ** 2
    if len(runs) > 1:
        variance += statistics.variance(logs) / len(runs)
    center, half = statistics.fmean(logs), _Z * math.sqrt(variance)
    return math.exp(center), math.exp(center - half), math.exp(center + half)


def quotient(over: Interval, under: Interval) -> Interval:
    """over / under, with the interval of two independent intervals."""
    half = math.hypot(*(math.log(high / low) / 2 for _, low, high in (over, under)))
    value = over[0] / under[0]
    return value, value * math.exp(-half), value * math.exp(half)


def markdown(rows: Sequence[Change], fail_below: float) -> str:
    lines = ["| comparison | ratio before | ratio after | speed | |", "|---|--:|--:|--:|---|"]
    for change in rows:
        verdict = change.verdict(fail_below)
        mark = "**" if verdict == "SLOWER" else ""
        cells = [change.name, *map(_words, (change.before, change.after, change.speed)), verdict]
        lines.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _words(interval: Interval) -> str:
    return "{:.2f}x ({:.2f} to {:.2f})".format(*interval)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare ratios of two results.")
    parser.add_argument("before", nargs="+", type=Path)
    parser.add_argument("--after", nargs="+", type=Path, required=True)
    parser.add_argument("--fail-below", type=float, default=0.9)
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
        rows = changes(before, after)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(rows, options.fail_below), end="")
    for side, names in (("before", before.keys() - after), ("after", after.keys() - before)):
        for name in sorted(names):
            print(f"Only {side}: {name}")
    return int(any(change.verdict(options.fail_below) == "SLOWER" for change in rows))


if __name__ == "__main__":
    sys.exit(main())
