"""Tests of the comparison of two results: regressions, intervals, output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flmoe_kernels.profile import compare
from flmoe_kernels.profile.compare import Change, changes

PAIR = "pair_moe/pair_base/forward/float32/pool"


def change_of(before: list[tuple[float, float]], after: list[tuple[float, float]]) -> Change:
    """Comparison of runs with these ratios and relative half widths of their intervals."""

    def side(runs: list[tuple[float, float]]) -> dict[str, list[compare.Interval]]:
        return {PAIR: [(x, x * (1 - half), x * (1 + half)) for x, half in runs]}

    [change] = changes(side(before), side(after))
    return change


def test_a_lower_ratio_is_a_regression_if_it_is_significant() -> None:
    slower = change_of([(2.0, 0.01)], [(1.5, 0.01)])
    assert slower.speed[0] == pytest.approx(0.75)
    assert slower.verdict(0.9) == "SLOWER"
    assert slower.verdict(0.7) == "slower, no failure"
    assert change_of([(2.0, 0.01)], [(2.0, 0.01)]).verdict(0.9) == "same"
    assert change_of([(1.5, 0.01)], [(2.0, 0.01)]).verdict(0.9) == "faster"
    # The same loss of 25%, with an interval of 25% on both sides.
    unsure = change_of([(2.0, 0.25)], [(1.5, 0.25)])
    assert unsure.speed[1] < 0.75 < 0.9 < unsure.speed[2]
    assert unsure.verdict(0.9) == "same"


def test_differences_between_runs_widen_the_interval() -> None:
    """Runs that agree make the interval narrower; runs that differ make it wider, even if theirs are narrow."""

    def width(change: Change) -> float:
        return change.speed[2] - change.speed[1]

    single = change_of([(2.0, 0.01)], [(2.0, 0.01)])
    assert width(change_of([(2.0, 0.01)] * 4, [(2.0, 0.01)] * 4)) < 0.6 * width(single)
    moody = change_of([(x, 0.01) for x in (1.6, 2.0, 2.5)], [(1.7, 0.01)] * 3)
    assert width(moody) > 3 * width(single)
    assert moody.verdict(0.9) == "same"


def written(path: Path, ratio: float, peer: str = "reference") -> str:
    spread = {"median": ratio, "low": 0.99 * ratio, "high": 1.01 * ratio}
    facts = {"case": PAIR, "peer": peer, "ratio": spread}
    path.write_text(json.dumps({"benchmarks": [{"extra_info": facts}, {"extra_info": {}}]}))
    return str(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [written(tmp_path / f"base-{run}.json", 2.0) for run in (1, 2)]
    after = written(tmp_path / "head.json", 1.5)
    assert compare.main([*before, "--after", after]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert f"**{PAIR} vs reference**" in lines[2]
    assert "**2.00x (1.99 to 2.01)**" in lines[2]
    assert "**SLOWER**" in lines[2]
    assert compare.main([*before, "--after", after, "--fail-below", "0.7"]) == 0
    assert compare.main([after, "--after", *before]) == 0
    capsys.readouterr()
    other = written(tmp_path / "other.json", 1.0, "torch")
    assert compare.main([*before, "--after", before[0], other]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Only after: {PAIR} vs torch"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a result of pytest --benchmark-json"),
        ('{"runs": []}', "not a result of pytest --benchmark-json"),
        ('{"benchmarks": []}', "no comparison in common"),
    ],
)
def test_files_that_cannot_be_compared(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    assert compare.main([str(path), "--after", written(tmp_path / "x.json", 1.0)]) == 2
    assert message in capsys.readouterr().err
