"""The committed budget and the page of docs that shows it: complete, with reasons, and the launch tables'."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.aot.architectures import ARCHITECTURES, H100, KIB
from bench.aot.budget import DEFAULT, Allowance, Budget, Limits, failures, load, save
from bench.aot.cases import CASES, listed
from bench.aot.report import MARK
from bench.aot.rows import Row, rows_of
from flmoe_kernels.core.files import END_MARK
from flmoe_kernels.core.triton.launches import Report

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "aot.md"
BUDGET = load(DEFAULT)
EVERY = listed(CASES)
NAME = "expert_attention/attend/mmimdb/bfloat16"
FINE = Report(168, 0, 36 * KIB, {"wgmma.mma_async": 16}, 4, 0)


def row(report: Report | str = FINE, name: str = NAME) -> Row:
    return rows_of([(EVERY[name], H100)], {(name, 90): report})[0]


def budget(*spills: Allowance, **limits: int) -> Budget:
    most = {"registers": 168, "shared": 36 * KIB, "spilled": 0, **limits}
    return Budget("3.7.1", {(NAME, 90): Limits(**most)}, spills)


def test_a_row_holds_what_was_compiled_and_what_follows() -> None:
    found = row()
    assert (found.held.blocks, found.held.warps, found.held.limit) == (3, 12, "registers")
    assert found.waves == found.programs / (3 * 132)
    assert found.times.limit == "bytes"
    assert found.as_dict()["times"]["seconds"] == found.times.seconds


def test_what_is_within_the_budget_does_not_fail() -> None:
    assert failures(row(), budget(), "3.7.1") == []
    assert failures(row(), budget(), "3.7.9") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 169}, "takes 169 registers, the budget is 168"),
        ({"shared": 36 * KIB + 1}, "takes 36865 bytes of shared memory, the budget is 36864"),
        ({"spilled": 8}, "spills 8 bytes a thread, allowed are 0"),
        ({"matrix": {}}, "has matrix products, but no matrix instructions"),
        ({"matrix": {"wgmma.mma_async": 7}}, "has 7 matrix instructions, 8 expected at least"),
        ({"shared": 228 * KIB}, "does not fit an SM: shared"),
    ],
)
def test_each_excess_fails(change: dict[str, object], message: str) -> None:
    found = dataclasses.replace(FINE, **change)
    assert message in failures(row(found), budget(), "3.7.1")


def test_a_kernel_that_does_not_compile_fails() -> None:
    assert failures(row("PTXASError: no\nmore"), budget(), "3.7.1") == [
        "does not compile: PTXASError: no"
    ]


def test_a_kernel_that_is_not_in_the_budget_fails() -> None:
    none = dataclasses.replace(budget(), limits={})
    assert failures(row(), none, "3.7.1") == ["is not in the budget: write it with --write-budget"]


def test_spills_are_allowed_by_name_and_architecture() -> None:
    spilled = row(dataclasses.replace(FINE, spilled=8))
    allowed = Allowance("expert_attention/*/bfloat16", (90,), 8, "why")
    assert failures(spilled, budget(allowed, spilled=8), "3.7.1") == []
    for other in ({"architectures": (80,)}, {"bytes": 4}, {"cases": "pair_moe/*"}):
        less = dataclasses.replace(allowed, **other)
        assert failures(spilled, budget(less, spilled=8), "3.7.1") != []


def test_another_compiler_is_held_to_less() -> None:
    """Neither registers nor shared memory, and spills with a margin; matrix units all the same."""
    more = dataclasses.replace(FINE, registers=255, shared=40 * KIB, spilled=128)
    assert failures(row(more), budget(), "3.6.0") == []
    assert failures(row(dataclasses.replace(more, spilled=136)), budget(), "3.6.0") != []
    assert failures(row(dataclasses.replace(more, matrix={})), budget(), "3.6.0") != []


def test_a_budget_is_what_was_saved(tmp_path: Path) -> None:
    some = budget(Allowance("a*", (80, 90), 8, 'a "reason"'))
    save(tmp_path / "budget.json", some)
    assert load(tmp_path / "budget.json") == some


def test_the_budget_names_every_case_on_every_architecture() -> None:
    assert set(BUDGET.limits) == {(name, number) for name in EVERY for number in ARCHITECTURES}


def test_every_spill_is_allowed_with_a_reason_and_every_allowance_is_needed() -> None:
    for each in BUDGET.spills:
        assert len(each.reason.split()) >= 5, each
    for (case, number), limits in BUDGET.limits.items():
        assert limits.spilled <= BUDGET.allowed(case, number), (case, number)
    for each in BUDGET.spills:
        without = dataclasses.replace(
            BUDGET, spills=tuple(other for other in BUDGET.spills if other is not each)
        )
        assert any(
            limits.spilled > without.allowed(case, number)
            for (case, number), limits in BUDGET.limits.items()
        ), f"nothing spills that only this allows: {each}"


def test_launch_tables_state_the_shared_memory_of_their_largest_case() -> None:
    largest: dict[tuple[str, str, int, int], int] = {}
    for name, case in EVERY.items():
        for number, device in ARCHITECTURES.items():
            built = case.built(device)
            if built.table is not None:
                key = (case.operator, built.tiles, number, built.table)
                largest[key] = max(largest.get(key, 0), BUDGET.limits[name, number].shared)
    wrong = {key: shared for key, shared in largest.items() if key[3] != shared}
    assert not wrong, "((.., written), compiled)"


def test_the_page_shows_every_case_as_the_budget_has_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition(MARK)[2].partition(END_MARK)[0]
    lines = {}
    operator = ""
    for line in table.splitlines():
        operator = line.removeprefix("### ") if line.startswith("### ") else operator
        if line.startswith("| ") and not line.startswith("| case"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            lines[f"{operator}/{cells[0].strip()}"] = cells[4:]
    assert set(EVERY) <= set(lines)
    for name in EVERY:
        for number, cell in zip(ARCHITECTURES, lines[name], strict=True):
            found = re.match(r"(\d+)(?:\+(\d+))? / ([\d.]+) / ", cell)
            assert found, (name, cell)
            limits = BUDGET.limits[name, number]
            assert int(found[1]) == limits.registers, (name, number)
            assert int(found[2] or 0) == limits.spilled, (name, number)
            assert float(found[3]) == pytest.approx(limits.shared / KIB, abs=0.051), (name, number)


def test_the_page_says_what_its_times_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "not measurements" in text
    assert "python -m bench.aot" in text
    for device in ARCHITECTURES.values():
        line = next(
            x for x in text.splitlines() if x.startswith(f"| {device.name} | {device.device}")
        )
        for figure in (
            f"| {device.multiprocessors} |",
            f"| {device.clock / 1e9:.2f} GHz |",
            f"| {device.flops_16 / 1e12:.0f} TFLOP/s | {device.flops_tf32 / 1e12:.0f} |",
            f"{device.bandwidth / 1e12:.2f}".rstrip("0"),
            f"| {device.shared // KIB} KiB |",
        ):
            assert figure in line
