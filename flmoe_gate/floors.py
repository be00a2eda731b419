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
from collections.abc import Collection, Mapping
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


_FLOOR_KEYS = tuple(f.name for f in dataclasses.fields(Floor))
_MACHINE_KEYS = tuple(f.name for f in dataclasses.fields(Machine) if f.name != "name")
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
    _known(f"{path}", content, ("defaults", "floor", "machine"))
    defaults = _table(f"{path}: defaults", content.get("defaults", {}))
    _known(f"{path}: [defaults]", defaults, [key for key in _FLOOR_KEYS if key != "case"])
    tables = content.get("floor", [])
    if not isinstance(tables, list) or not tables:
        raise FloorsError(f"{path}: floor: expected at least one [[floor]] table")
    floors = tuple(
        _floor(f"{path}: [[floor]] {number}", {**defaults, **_table(f"{path}: floor", table)})
        for number, table in enumerate(tables, start=1)
    )
    keys = [floor.key for floor in floors]
    for key in keys:
        if keys.count(key) > 1:
            raise FloorsError(f"{path}: '{key}' occurs more than once")
    machines = _table(f"{path}: machine", content.get("machine", {}))
    return Floors(floors, tuple(_machine(path, name, machines[name], keys) for name in machines))


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FloorsError(f"{where}: expected a table, got {value!r}")
    return value


def _known(where: str, table: Mapping[str, Any], keys: Collection[str]) -> None:
    for key in table:
        if key not in keys:
            raise FloorsError(f"{where}: unknown key '{key}'; known: {', '.join(keys)}")


def _floor(where: str, table: dict[str, Any]) -> Floor:
    _known(where, table, _FLOOR_KEYS)
    for key in ("case", "peer", "ratio"):
        if key not in table:
            raise FloorsError(f"{where}: {key} is missing")
    where = f"{where} ('{table['case']}')"
    for key in ("case", "peer"):
        if not (isinstance(table[key], str) and table[key]):
            raise FloorsError(f"{where}: {key}: expected a name, got {table[key]!r}")
    for key in _RANGES.keys() & table.keys():
        _number(f"{where}: {key}", table[key], *_RANGES[key], whole=key in _COUNTS)
    if table.get("device", "cpu") not in ("cpu", "cuda"):
        raise FloorsError(f"{where}: device: expected 'cpu' or 'cuda', got {table['device']!r}")
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
