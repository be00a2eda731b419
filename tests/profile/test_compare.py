"""Comparing two results: what counts as slower, how sure that must be, and what table and picture show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flmoe_kernels.profile import compare as comparing
from flmoe_kernels.profile.paired import Blocks
from flmoe_kernels.profile.results import (
    ResultError,
    Row,
    Run,
    load_runs,
    row_of,
    rows_of,
    save_run,
)

PAIR, ROUTED = "pair_moe/pair_base/forward/float32/pool", "routing/routed_small_e4/forward/float32"


def run_of(
    ours: float = 0.010,
    ratio: float = 2.0,
    spread: float = 0.01,
    machine: float = 1.0,
    commit: str = "abc",
) -> Run:
    """One case with a peer and one alone; a slower machine takes `machine` times as long for everything."""

    def row(case: str, name: str, seconds: float, **more: Any) -> Row:
        p50 = seconds * machine
        low, high = p50 * (1 - spread), p50 * (1 + spread)
        return Row(case, name, p50, low, high, low, high, 30, 1, "processor", **more)

    ratios = {"ratio_low": ratio * (1 - spread), "ratio_high": ratio * (1 + spread)}
    rows = [
        row(PAIR, "cpu", ours),
        row(PAIR, "reference", ours * ratio, against="cpu", ratio=ratio, **ratios),
        row(ROUTED, "cpu", 0.002),
    ]
    facts = {"device": "AMD EPYC", "instruction_set": "avx512", "torch": "2.13.0", "commit": commit}
    return Run(facts, rows)


def test_a_slower_machine_is_no_regression_but_a_slower_kernel_is() -> None:
    same = comparing.compare([run_of()], [run_of(machine=2.0)])
    pair, alone = same.changes
    assert (pair.case, pair.ours, pair.peer, pair.by) == (PAIR, "cpu", "reference", "ratio")
    assert pair.speed == pytest.approx(1.0)
    assert not pair.regression
    # What has no peer beside it can only be told by its time.
    assert (alone.case, alone.peer, alone.by) == (ROUTED, "", "time")
    assert alone.regression
    assert comparing.compare([run_of()], [run_of(machine=2.0)], by="time").changes[0].regression
    slower = comparing.compare([run_of()], [run_of(ours=0.013, ratio=2.0 / 1.3)])
    assert [change.case for change in slower.regressions] == [PAIR]
    assert slower.changes[0].speed == pytest.approx(1 / 1.3)
    assert slower.changes[0].verdict == "SLOWER"


def test_what_is_not_sure_is_not_significant() -> None:
    """The same 25% with an interval of 25% to either side, on both."""
    before, after = run_of(spread=0.25), run_of(ratio=1.5, spread=0.25)
    (change, _) = comparing.compare([before], [after]).changes
    assert change.speed == pytest.approx(0.75)
    assert change.low < 0.75 < 0.9 < change.high
    assert not change.regression
    assert change.verdict == "same"
    (sure, _) = comparing.compare([run_of()], [run_of(ratio=1.5)]).changes
    assert sure.regression


def test_the_limit_is_the_callers() -> None:
    before, after = [run_of()], [run_of(ratio=1.9)]
    assert not comparing.compare(before, after).regressions
    assert comparing.compare(before, after).changes[0].verdict == "slower, no failure"
    assert comparing.compare(before, after, fail_below=0.99).regressions
    assert comparing.compare(after, before).changes[0].verdict == "faster"
    with pytest.raises(ValueError, match="fail_below: expected a number above 0, got 0"):
        comparing.compare(before, after, fail_below=0)


def test_repeated_runs_count_with_what_they_differ_by() -> None:
    """Runs that agree narrow the interval; runs that do not, widen it, however narrow each is."""
    one = comparing.compare([run_of()], [run_of()]).changes[0]
    agreeing = comparing.compare([run_of()] * 4, [run_of()] * 4).changes[0]
    assert agreeing.high - agreeing.low < 0.6 * (one.high - one.low)
    moody = [run_of(ratio=ratio) for ratio in (1.6, 2.0, 2.5)]
    unsure = comparing.compare(moody, [run_of(ratio=1.7)] * 3).changes[0]
    assert not unsure.regression
    assert unsure.high - unsure.low > 3 * (one.high - one.low)


def test_what_one_side_lacks_is_named() -> None:
    before, after = run_of(), run_of()
    after.rows[:] = [row for row in after.rows if row.case == PAIR]
    found = comparing.compare([before], [after])
    assert found.only_before == [f"{ROUTED} (cpu)"]
    assert f"only before: {ROUTED} (cpu)" in found.summary()
    assert comparing.compare([after], [before]).only_after == [f"{ROUTED} (cpu)"]
    after.rows.clear()
    with pytest.raises(ValueError, match="no case and contestants in common"):
        comparing.compare([before], [after])


def test_table_and_markdown_tell_the_same() -> None:
    found = comparing.compare([run_of(commit="old")], [run_of(ratio=1.5, commit="new")])
    text = comparing.markdown(found)
    lines = text.splitlines()
    widths = {line.count("|") for line in lines[: 2 + len(found.changes)]}
    assert widths == {len(comparing.HEADINGS) + 1}
    assert lines[1] == "|" + " --- |" * len(comparing.HEADINGS)
    bad, good = lines[2], lines[3]
    assert f"**{PAIR}**" in bad
    assert "**SLOWER**" in bad
    assert "**0.75x (0.74 to 0.76)**" in bad
    assert "**2.00x (1.98 to 2.02)**" in bad
    assert "**10 ms (9.9 to 10.1)**" in bad
    assert "**" not in good
    assert "same" in good
    assert "- before: AMD EPYC, avx512, torch 2.13.0, commit old, 1 run" in lines
    assert "- 1 of 2 surely below 0.9 of the speed before, by ratio" in lines
    table = comparing.table(found)
    columns = [list(column.cells) for column in table.columns]
    assert [tuple(row) for row in zip(*columns, strict=True)] == [
        comparing.cells(change) for change in found.changes
    ]


def test_everything_is_plain_json() -> None:
    found = comparing.compare([run_of()], [run_of(ratio=1.5)])
    content = json.loads(json.dumps(found.as_dict()))
    assert [change["verdict"] for change in content["changes"]] == ["SLOWER", "same"]
    assert content["changes"][0]["before"]["ratio"] == pytest.approx(2.0)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    from flmoe_kernels.profile.compare_plot import comparison_figure, save_figure

    found = comparing.compare([run_of()], [run_of(ratio=1.5)])
    (axes,) = comparison_figure(found).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{PAIR} vs reference", ROUTED]
    shown = [float(container.lines[0].get_xdata()[0]) for container in axes.containers]
    assert shown == pytest.approx([0.75, 1.0])
    markers = [container.lines[0].get_marker() for container in axes.containers]
    assert markers == ["s", "o"]
    low, high = axes.get_xlim()
    assert low < found.changes[0].low
    assert high > found.changes[1].high
    path = tmp_path / "sub" / f"compare.{suffix}"
    save_figure(found, path)
    assert path.stat().st_size > 1000
    with pytest.raises(ValueError, match=r"plot: expected a name in .*, got 'x.txt'"):
        save_figure(found, tmp_path / "x.txt")


def test_results_are_written_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    save_run(path, run_of(), append=True)
    save_run(path, run_of(ratio=1.5), append=True)
    assert load_runs(path) == [run_of(), run_of(ratio=1.5)]
    save_run(path, run_of(ratio=3.0))
    assert load_runs(path) == [run_of(ratio=3.0)]


def test_rows_of_a_measurement() -> None:
    seconds = {"cpu": [1.0, 1.0], "reference": [2.0, 2.0], "compiled": [3.0, 3.0]}
    blocks = Blocks("processor", [seconds] * 6)
    ours, peer = rows_of(PAIR, "cpu", "reference", 1, blocks.pair("cpu", "reference"))
    assert ours == row_of(PAIR, "cpu", 1, blocks)
    assert (ours.p50, ours.against, ours.ratio, ours.rounds) == (1.0, "", None, 12)
    assert (peer.p50, peer.against, peer.ratio, peer.ratio_low) == (2.0, "cpu", 2.0, 2.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "schema: expected 'flmoe_kernels.bench/1', got 'list'"),
        ('{"schema": "other"}', "got 'other'"),
        ('{"schema": "flmoe_kernels.bench/1", "runs": []}', "runs: expected one at least"),
        ('{"schema": "flmoe_kernels.bench/1"}', "incomplete: 'runs'"),
        (
            '{"schema": "flmoe_kernels.bench/1", "runs": [{"environment": {}, "rows": [{"case": "x"}]}]}',
            "incomplete: .*missing",
        ),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ResultError, match=message) as error:
        load_runs(path)
    assert str(path) in str(error.value)
    with pytest.raises(ResultError, match="cannot be read"):
        load_runs(tmp_path / "absent.json")
