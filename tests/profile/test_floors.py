"""Tests of the file of floors: content, error messages, updates of a machine's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from flmoe_gate.floors import (
    Floor,
    FloorsError,
    Here,
    Machine,
    load_floors,
    update_file,
)

CASE, OTHER = "pair_moe/pair_base/forward/float32/pool", "pair_moe/pair_base/forward/float32/none"
HERE = Here("AMD EPYC 9655", "avx512", "", "2.13.0+cpu")
GOOD = f"""
# A comment that stays.
[defaults]
tolerance = 0.1
rounds = 20

[[floor]]
case = "{CASE}"
peer = "reference"
ratio = 1.5

[[floor]]  # another
case = "{OTHER}"
peer = "compiled"
ratio = 2
tolerance = 0.2

[machine.big]
cpu = "EPYC"
isa = "avx512"

[machine.big.ratio]
"{CASE} vs reference" = 2.5

[machine.any-avx2]
isa = "avx2"

[machine.any-avx2.ratio]
"{CASE} vs reference" = 1.9
"{OTHER} vs compiled" = 2.2
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "floors.toml"
    path.write_text(text)
    return path


def test_floors_use_the_defaults(tmp_path: Path) -> None:
    floors = load_floors(written(tmp_path, GOOD))
    assert floors.floors == (
        Floor(CASE, "reference", 1.5, tolerance=0.1, rounds=20),
        Floor(OTHER, "compiled", 2, tolerance=0.2, rounds=20),
    )
    assert [machine.name for machine in floors.machines] == ["big", "any-avx2"]


@pytest.mark.parametrize(
    ("here", "ratios"),
    [
        (HERE, [(2.5, "big"), (2, "any machine")]),
        (Here("AMD EPYC", "avx2", "", "2.6"), [(1.9, "any-avx2"), (2.2, "any-avx2")]),
        (Here("Xeon", "avx512", "", "2.6"), [(1.5, "any machine"), (2, "any machine")]),
    ],
)
def test_the_first_matching_machine_is_used(
    tmp_path: Path, here: Here, ratios: list[tuple[float, str]]
) -> None:
    floors = load_floors(written(tmp_path, GOOD))
    assert [floors.expected(floor, here) for floor in floors.floors] == ratios


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "tolerance = 0.2",
            "tolerence = 0.2",
            r"floor\]\] 2: unknown key 'tolerence'; known: case, .*tolerance",
        ),
        ("[defaults]", "[default]", r"unknown key 'default'; known: defaults, floor, machine"),
        ("cpu = ", "cores = 2\ncpu = ", r"\[machine.big\]: unknown key 'cores'"),
        ("ratio = 1.5", "", r"floor\]\] 1: ratio is missing"),
        ("ratio = 1.5", "ratio = -1.5", r"ratio: expected a number above 0, .* got -1.5"),
        ("ratio = 1.5", "ratio = nan", r"ratio: expected a number .* got nan"),
        ("rounds = 20", "rounds = 2.5", r"rounds: expected a whole number .* got 2.5"),
        ("tolerance = 0.2", 'device = "tpu"', r"device: expected cpu or cuda, got 'tpu'"),
        ("= 2.5", "= 0", r"\[machine.big\]: ratio: .*: expected a number above 0"),
        (
            f'"{OTHER} vs compiled" = 2.2',
            '"x vs y" = 2.2',
            r"any-avx2\]: ratio: unknown key 'x vs y'",
        ),
        (f'{OTHER}"\npeer = "compiled"', f'{CASE}"\npeer = "reference"', "more than once"),
        ("[defaults]", "[defaults", "not a TOML file"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(FloorsError, match=message) as error:
        load_floors(path)
    assert str(path) in str(error.value)


def test_files_without_floors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FloorsError, match="expected at least one"):
        load_floors(written(tmp_path, "[defaults]\n"))
    with pytest.raises(FloorsError, match="cannot be read"):
        load_floors(tmp_path / "absent.toml")


def test_a_machine_is_written_and_read_back(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    name = update_file(path, HERE, {f"{CASE} vs reference": 2.71828})
    floors, text = load_floors(path), path.read_text()
    assert name == "amd-epyc-9655-avx512"
    assert "# A comment that stays." in text
    assert text.split("[machine")[0] == GOOD.split("[machine")[0]
    # It comes before the others, so that it is the first match.
    assert floors.expected(floors.floors[0], HERE) == (2.72, name)
    assert floors.machines[0] == Machine(
        name, "AMD EPYC 9655", "avx512", "", "2.13.", {f"{CASE} vs reference": 2.72}
    )
    assert [machine.name for machine in floors.machines] == [name, "big", "any-avx2"]


def test_a_second_update_replaces_the_first(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    first = {f"{CASE} vs reference": 2.0, f"{OTHER} vs compiled": 3.0}
    update_file(path, HERE, first)
    once = path.read_text()
    name = update_file(path, HERE, {f"{CASE} vs reference": 4.0})
    floors = load_floors(path)
    # Ratios that were not measured this time are kept.
    assert dict(floors.machines[0].ratio) == {**first, f"{CASE} vs reference": 4.0}
    assert path.read_text().count(f"[machine.{name}]") == 1
    update_file(path, HERE, first)
    assert path.read_text() == once
