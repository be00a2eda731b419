"""The file of floors that `bench --gate` holds a machine to: what is timed, and which ratio is expected.

A TOML file with three kinds of tables (docs/benchmarks.md has an example):

    [defaults]             any key of a floor but case: what floors have that do not say otherwise
    [[floor]]              one comparison: case, peer, ratio, ours, device, tolerance, precision, rounds, seconds,
                           threads, quick
    [machine.NAME]         cpu, isa, device, torch: which machines are meant; below it
    [machine.NAME.ratio]   "case vs peer" = the ratio expected there

`ratio` of a floor holds on any machine and is therefore low: how far a kernel is ahead of its peer depends on
the instruction set, the processor and the release of torch. The first machine table that describes this
machine replaces it by what was measured there; `bench --gate FILE --update FILE` writes such a table.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# In the standard library from Python 3.11 on.
_toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


class FloorsError(ValueError):
    """The file of floors cannot be used; the message names the file, the table, the key and what was expected."""


@dataclass(frozen=True)
class Floor:
    """One comparison of the gate.

    Attributes:
        case: name of a case, see `flmoe_kernels.profile.cases`.
        peer, ours: names of contestants of that case.
        ratio: seconds of the peer over seconds of ours, expected on any machine.
        device: "cpu" or "cuda".
        tolerance: the share of the expected ratio by which the measured one may fall short.
        precision: rounds go on until the interval of the median ratio is this narrow, as a share of it.
        rounds: at least so many.
        seconds: and for at most so long.
        threads: of torch and the kernels. With one, contestants are timed by the processor's time that they
            used, which another process on the machine does not lengthen; with more, by the clock.
        quick: part of the quick set; the others run with --full.
    """

    case: str
    peer: str
    ratio: float
    ours: str = "cpu"
    device: str = "cpu"
    tolerance: float = 0.10
    precision: float = 0.04
    rounds: int = 15
    seconds: float = 8.0
    threads: int = 1
    quick: bool = True

    @property
    def key(self) -> str:
        """What a machine's table calls it."""
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.case} vs {self.peer}{where}"


@dataclass(frozen=True)
class Machine:
    """Machines on which the ratios of floors were measured.

    cpu and device match a part of the processor's or GPU's name, torch the start of its version, isa the
    instruction set that the kernels chose; "" matches any.
    """

    name: str
    cpu: str = ""
    isa: str = ""
    device: str = ""
    torch: str = ""
    ratio: Mapping[str, float] = field(default_factory=dict)

    def describes(self, here: Here) -> bool:
        return (
            self.cpu in here.cpu
            and self.isa in ("", here.isa)
            and self.device in here.device
            and here.torch.startswith(self.torch)
        )


@dataclass(frozen=True)
class Here:
    """What of this machine decides which table describes it; device is "" without a GPU."""

    cpu: str
    isa: str
    device: str
    torch: str


@dataclass(frozen=True)
class Floors:
    floors: tuple[Floor, ...]
    machines: tuple[Machine, ...] = ()

    def machine(self, here: Here) -> Machine | None:
        """The first machine table that describes this machine."""
        return next((m for m in self.machines if m.describes(here)), None)

    def expected(self, floor: Floor, here: Here) -> tuple[float, str]:
        """The ratio expected of a floor here, and whose it is: a machine's name, or "any machine"."""
        machine = self.machine(here)
        if machine is None or floor.key not in machine.ratio:
            return floor.ratio, "any machine"
        return machine.ratio[floor.key], machine.name


_TABLES = ("defaults", "floor", "machine")
_FLOOR_KEYS = tuple(f.name for f in dataclasses.fields(Floor))
_MACHINE_KEYS = tuple(f.name for f in dataclasses.fields(Machine) if f.name != "name")
_WORDS = ("case", "peer", "ours")
DEVICES = ("cpu", "cuda")
_COUNTS = ("rounds", "threads")
# key -> (above, up to)
_RANGES: dict[str, tuple[float, float]] = {
    "ratio": (0.0, 1e6),
    "tolerance": (0.0, 0.9),
    "precision": (0.0, 1.0),
    "rounds": (4, 100_000),
    "seconds": (0.0, 3600.0),
    "threads": (0, 4096),
}


def load_floors(path: Path, known_cases: Collection[str] | None = None) -> Floors:
    """Read and check a file of floors.

    Args:
        known_cases: names that `case` may have; None leaves them unchecked.

    Raises:
        FloorsError: no such file, no TOML, an unknown table, key or case, a value of the wrong type or out of
            range, the same comparison twice, or a machine's ratio of a comparison that is not in the file.
    """
    try:
        content = _toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FloorsError(f"{path}: cannot be read: {error.strerror}") from error
    except (_toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FloorsError(f"{path}: not a TOML file: {error}") from error
    _known(f"{path}", content, _TABLES)
    defaults = _table(f"{path}: defaults", content.get("defaults", {}))
    _known(f"{path}: [defaults]", defaults, [key for key in _FLOOR_KEYS if key != "case"])
    tables = content.get("floor", [])
    if not isinstance(tables, list) or not tables:
        raise FloorsError(f"{path}: floor: expected at least one [[floor]] table")
    floors = tuple(
        _floor(f"{path}: [[floor]] {number}", defaults, table, known_cases)
        for number, table in enumerate(tables, start=1)
    )
    keys = [floor.key for floor in floors]
    for key in keys:
        if keys.count(key) > 1:
            raise FloorsError(f"{path}: '{key}' stands there more than once")
    machines = _table(f"{path}: machine", content.get("machine", {}))
    return Floors(floors, tuple(_machine(path, name, machines[name], keys) for name in machines))


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FloorsError(f"{where}: expected a table, got {value!r}")
    return value


def _known(where: str, table: Mapping[str, Any], keys: Collection[str]) -> None:
    for key in table:
        if key not in keys:
            raise FloorsError(f"{where}: unknown key '{key}'{_nearest(key, keys)}")


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"


def _floor(
    where: str, defaults: Mapping[str, Any], table: Any, known_cases: Collection[str] | None
) -> Floor:
    table = {**defaults, **_table(where, table)}
    _known(where, table, _FLOOR_KEYS)
    for key in ("case", "peer", "ratio"):
        if key not in table:
            raise FloorsError(f"{where}: {key} is missing")
    where = f"{where} ('{table['case']}')"
    for key in _WORDS:
        if key in table and not (isinstance(table[key], str) and table[key]):
            raise FloorsError(f"{where}: {key}: expected a name, got {table[key]!r}")
    for key in _RANGES:
        if key in table:
            _number(f"{where}: {key}", table[key], *_RANGES[key], whole=key in _COUNTS)
    if not isinstance(table.get("quick", True), bool):
        raise FloorsError(f"{where}: quick: expected true or false, got {table['quick']!r}")
    if table.get("device", "cpu") not in DEVICES:
        raise FloorsError(f"{where}: device: expected 'cpu' or 'cuda', got {table['device']!r}")
    if known_cases is not None and table["case"] not in known_cases:
        raise FloorsError(f"{where}: unknown case{_nearest(table['case'], known_cases)}")
    return Floor(**table)


def _number(where: str, value: Any, above: float, most: float, whole: bool = False) -> None:
    kind = "a whole number" if whole else "a number"
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (fits and above < value <= most):
        raise FloorsError(
            f"{where}: expected {kind} above {above:g}, up to {most:g}, got {value!r}"
        )


def _machine(path: Path, name: str, table: Any, keys: Collection[str]) -> Machine:
    where = f"{path}: [machine.{name}]"
    table = _table(where, table)
    _known(where, table, _MACHINE_KEYS)
    for key in _MACHINE_KEYS:
        if key != "ratio" and not isinstance(table.get(key, ""), str):
            raise FloorsError(f"{where}: {key}: expected a string, got {table[key]!r}")
    ratio = _table(f"{where}: ratio", table.get("ratio", {}))
    _known(f"{where}: ratio", ratio, keys)
    for key, value in ratio.items():
        _number(f"{where}: ratio: '{key}'", value, *_RANGES["ratio"])
    return Machine(name=name, **table)


def machine_table(machine: Machine) -> str:
    """A machine as TOML."""
    lines = [f"[machine.{machine.name}]"]
    for key in ("cpu", "isa", "device", "torch"):
        if getattr(machine, key):
            lines.append(f"{key} = {json.dumps(getattr(machine, key))}")
    lines += ["", f"[machine.{machine.name}.ratio]"]
    # JSON's strings are TOML's basic strings.
    lines += [f"{json.dumps(key)} = {value:.3g}" for key, value in machine.ratio.items()]
    return "\n".join(lines) + "\n"


def machine_name(here: Here) -> str:
    """A bare TOML key for a machine: its processor (or GPU) and instruction set."""
    words = here.device or f"{here.cpu} {here.isa}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "this-machine"


def machine_of(here: Here, ratio: Mapping[str, float]) -> Machine:
    """The table of this machine: told by its GPU if it has one, else by processor and instruction set.

    And by torch's minor release, whose operators the peers are made of.
    """
    gpu = bool(here.device)
    return Machine(
        name=machine_name(here),
        cpu="" if gpu else here.cpu,
        isa="" if gpu else here.isa,
        device=here.device,
        torch=".".join(here.torch.split(".")[:2]) + ".",
        ratio=ratio,
    )


def update_file(path: Path, source: Path, machine: Machine) -> str:
    """Write a machine's table into a file of floors, made as a copy of `source` if it is not there.

    Ratios of comparisons that were not measured now stay as they were. Returns the table's name.
    """
    text = (path if path.exists() else source).read_text(encoding="utf-8")
    before = load_floors(path if path.exists() else source)
    keys = [floor.key for floor in before.floors]
    lost = [key for key in machine.ratio if key not in keys]
    if lost:
        raise FloorsError(f"{path}: has no floor '{lost[0]}', which was measured")
    old = next((m.ratio for m in before.machines if m.name == machine.name), {})
    merged = {**old, **machine.ratio}
    machine = dataclasses.replace(machine, ratio={k: merged[k] for k in keys if k in merged})
    path.write_text(update_text(text, machine), encoding="utf-8")
    return machine.name


def update_text(text: str, machine: Machine) -> str:
    """The text of a file of floors with this machine's table in it, in place of one of its name.

    Everything else, comments included, stays as it is. A new table goes to the front of the machines, since the
    first that describes a machine counts.
    """
    tables = re.split(r"(?m)^(?=\[)", text)
    own = re.compile(rf"\[machine\.{re.escape(machine.name)}(\.ratio)?\]")
    places = [i for i, table in enumerate(tables) if own.match(table)]
    others = [i for i, table in enumerate(tables) if table.startswith("[machine.")]
    place = (places or others or [len(tables)])[0]
    new = machine_table(machine) + ("\n" if place < len(tables) else "")
    if place == len(tables):
        new = "\n" + new
    tables.insert(place, new)
    return "".join(t for i, t in enumerate(tables) if i == place or not own.match(t))
