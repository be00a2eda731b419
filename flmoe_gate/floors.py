"""TOML file of expected ratios that `pytest --gate FILE` checks.

    [defaults]             any key of a floor except case, for floors that do not set it
    [[floor]]              a comparison: case, peer, ratio, device, tolerance, precision, rounds,
                           seconds, threads
    [machine.NAME]         cpu, isa, device, torch: the machines that the table describes
    [machine.NAME.ratio]   "case vs peer" = the ratio expected on these machines

`ratio` of a floor holds on any machine and is therefore low: the ratio to a peer depends on the instruction set,
the processor and the release of torch. The first machine table that describes this machine replaces it by measured
ratios; `pytest --gate FILE --gate-update` writes such a table.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Part of the standard library since Python 3.11.
_toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


class FloorsError(ValueError):
    """The file cannot be used; the message names the file, the table, the key and what was expected."""


@dataclass(frozen=True)
class Floor:
    """A comparison of the regression check.

    Attributes:
        case, peer: names that the suite passes to `benchmark_against`.
        ratio: seconds of the peer over seconds of ours, expected on any machine.
        device: "cpu" or "cuda".
        tolerance: share of the expected ratio by which the measured ratio may be lower.
        precision: rounds continue until both ends of the interval are this close to the median, relative to it.
        rounds: minimum number of rounds.
        seconds: time limit.
        threads: number of torch's threads, if torch is loaded. A single thread is timed by processor time,
            which other processes do not increase; several threads are timed by the wall clock.
    """

    case: str
    peer: str
    ratio: float
    device: str = "cpu"
    tolerance: float = 0.10
    precision: float = 0.04
    rounds: int = 15
    seconds: float = 8.0
    threads: int = 1

    @property
    def key(self) -> str:
        return key_of(self.case, self.peer, self.device)

    def bound(self, expected: float) -> float:
        return expected * (1 - self.tolerance)


def key_of(case: str, peer: str, device: str) -> str:
    """Name of a comparison in a machine's table."""
    return f"{case} vs {peer}" + ("" if device == "cpu" else f" on {device}")


@dataclass(frozen=True)
class Here:
    """Facts of this machine, used to select its table; "" if unknown. device: name of the GPU."""

    cpu: str
    isa: str
    device: str
    torch: str


@dataclass(frozen=True)
class Machine:
    """Ratios measured on one kind of machine.

    cpu and device match a part of the processor's or GPU's name, torch the start of its version, isa the
    instruction set of the kernels; "" matches any.
    """

    name: str
    cpu: str = ""
    isa: str = ""
    device: str = ""
    torch: str = ""
    ratio: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, here: Here, ratio: Mapping[str, float]) -> Machine:
        """Make the table of this machine: by GPU if there is one, else by processor and instruction set; and by
        torch's minor release, because peers use torch's operators."""
        gpu = bool(here.device)
        words = here.device or f"{here.cpu} {here.isa}"
        return cls(
            name=re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "this-machine",
            cpu="" if gpu else here.cpu,
            isa="" if gpu else here.isa,
            device=here.device,
            torch=".".join(here.torch.split(".")[:2]) + "." if here.torch else "",
            ratio=ratio,
        )

    def describes(self, here: Here) -> bool:
        return (
            self.cpu in here.cpu
            and self.isa in ("", here.isa)
            and self.device in here.device
            and here.torch.startswith(self.torch)
        )

    def toml(self) -> str:
        lines = [f"[machine.{self.name}]"]
        for key in ("cpu", "isa", "device", "torch"):
            if getattr(self, key):
                lines.append(f"{key} = {json.dumps(getattr(self, key))}")
        lines += ["", f"[machine.{self.name}.ratio]"]
        # JSON's strings are TOML's basic strings.
        lines += [f"{json.dumps(key)} = {value:.3g}" for key, value in self.ratio.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Floors:
    floors: tuple[Floor, ...]
    machines: tuple[Machine, ...] = ()

    def find(self, key: str) -> Floor | None:
        return next((floor for floor in self.floors if floor.key == key), None)

    def machine(self, here: Here) -> Machine | None:
        """The first machine table that describes this machine."""
        return next((machine for machine in self.machines if machine.describes(here)), None)

    def expected(self, floor: Floor, here: Here) -> tuple[float, str]:
        """Ratio expected here, and its source: a machine's name, or "any machine"."""
        machine = self.machine(here)
        if machine is None or floor.key not in machine.ratio:
            return floor.ratio, "any machine"
        return machine.ratio[floor.key], machine.name


# Kind of each value: a type, a set of names, or (exclusive lower bound, inclusive upper bound, whole number only).
_RATIO = (0.0, 1e6, False)
_FLOOR: dict[str, Any] = {
    "case": str,
    "peer": str,
    "ratio": _RATIO,
    "device": {"cpu", "cuda"},
    "tolerance": (0.0, 0.9, False),
    "precision": (0.0, 1.0, False),
    "rounds": (4, 100_000, True),
    "seconds": (0.0, 3600.0, False),
    "threads": (0, 4096, True),
}
_MACHINE: dict[str, Any] = {"cpu": str, "isa": str, "device": str, "torch": str, "ratio": dict}
_FILE: dict[str, Any] = {"defaults": dict, "floor": list, "machine": dict}
_NAMES: dict[Any, str] = {str: "a string", dict: "a table", list: "an array of tables"}


def load_floors(path: Path) -> Floors:
    """Read and check a file of floors.

    Raises:
        FloorsError: missing file, invalid TOML, unknown table or key, value of the wrong type or out of range,
            duplicate comparison, or a machine's ratio for a comparison that is not in the file.
    """
    try:
        content = _toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FloorsError(f"{path}: cannot be read: {error.strerror}") from error
    except (_toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FloorsError(f"{path}: not a TOML file: {error}") from error
    _check(f"{path}", content, _FILE)
    defaults = content.get("defaults", {})
    _check(f"{path}: [defaults]", defaults, {k: _FLOOR[k] for k in _FLOOR if k != "case"})
    if not content.get("floor"):
        raise FloorsError(f"{path}: floor: expected at least one [[floor]] table")
    floors = []
    for number, table in enumerate(content["floor"], start=1):
        where = f"{path}: [[floor]] {number}"
        _check(where, table, _FLOOR)
        floor = {**defaults, **table}
        if missing := {"case", "peer", "ratio"} - floor.keys():
            raise FloorsError(f"{where}: {min(missing)} is missing")
        floors.append(Floor(**floor))
    keys = [floor.key for floor in floors]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise FloorsError(f"{path}: '{repeated[0]}' occurs more than once")
    machines = []
    for name, table in content.get("machine", {}).items():
        where = f"{path}: [machine.{name}]"
        _check(where, table, _MACHINE)
        _check(f"{where}: ratio", table.get("ratio", {}), dict.fromkeys(keys, _RATIO))
        machines.append(Machine(name, **table))
    return Floors(tuple(floors), tuple(machines))


def _check(where: str, table: Any, kinds: Mapping[str, Any]) -> None:
    """Check the keys of a table and the kinds of their values."""
    if not isinstance(table, dict):
        raise FloorsError(f"{where}: expected a table, got {table!r}")
    for key, value in table.items():
        match kinds.get(key):
            case None:
                raise FloorsError(f"{where}: unknown key '{key}'; known: {', '.join(kinds)}")
            case type() as kind:
                expected, fits = _NAMES[kind], isinstance(value, kind)
            case set() as names:
                expected, fits = " or ".join(sorted(names)), value in sorted(names)
            case (above, most, whole):
                expected = f"a {'whole ' * whole}number above {above:g}, up to {most:g}"
                fits = type(value) in ((int,) if whole else (int, float)) and above < value <= most
        if not fits:
            raise FloorsError(f"{where}: {key}: expected {expected}, got {value!r}")


def update_file(path: Path, here: Here, ratio: Mapping[str, float]) -> str:
    """Write this machine's table into a file of floors; return its name. Ratios that were not measured are kept.

    Everything else, including comments, is kept. A new table goes before the other tables, because the first table
    that describes a machine is used.
    """
    floors = load_floors(path)
    machine = Machine.of(here, ratio)
    old = next((m.ratio for m in floors.machines if m.name == machine.name), {})
    merged = {**old, **ratio}
    keys = [floor.key for floor in floors.floors]
    machine = dataclasses.replace(machine, ratio={k: merged[k] for k in keys if k in merged})

    tables = re.split(r"(?m)^(?=\[)", path.read_text(encoding="utf-8"))
    own = re.compile(rf"\[machine\.{re.escape(machine.name)}(\.ratio)?\]")
    places = [i for i, table in enumerate(tables) if own.match(table)]
    others = [i for i, table in enumerate(tables) if table.startswith("[machine.")]
    place = (places or others or [len(tables)])[0]
    last = place == len(tables)
    kept_after = [table for table in tables[place:] if not own.match(table)]
    text = "\n" * last + machine.toml() + "\n" * bool(kept_after)
    text = "".join(tables[:place]) + text + "".join(kept_after)
    whole = path.resolve()  # of a link, the file that it points to is replaced
    part = whole.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(whole)
    return machine.name
