"""PTX text to basic blocks of steps.

A step changes registers. A register is an array of unsigned integers, or bool for predicates, with one value for
all threads or a value for each thread of a group of CTAs. Constants, parameters and special registers are
registers, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Array, dtype_of, fit, operation

if TYPE_CHECKING:
    from .machine import Group

Registers = list[Array]
Step = Callable[[Registers, "Group"], None]
# Register of a predicate, and whether it is negated.
Guard = tuple[int, bool]
Operand = str | list[str]

_DTYPES = {"%p": "?", "%rs": "u2", "%r": "u4", "%f": "u4"}
_DTYPES |= dict.fromkeys(("%rd", "%fd", "%SP", "%SPL"), "u8")
_SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_LABEL = re.compile(r"\s*([$\w]+):")
_STACK = re.compile(r"\.local \.align \d+ \.b8 (\w+)\[(\d+)\]")
_PARAMETER = re.compile(
    r"\.param (?:\.align (\d+) )?\.(\w+) (?:\.ptr \.global \.align \d+ )?(\w+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"\.extern \.shared [^;]*?(\w+)\[")


@dataclass
class Block:
    """Steps, then a branch to `target` by threads whose guard holds; without a target the next block follows."""

    steps: list[Step] = field(default_factory=list)
    target: str | None = None
    guard: Guard | None = None


class Program:
    """A kernel of a PTX text: the one with the given name, else the first.

    Attributes:
        initial: value of each register at the start; None for special registers.
        names: register of each name.
        parameters: first byte, size and dtype of each parameter.
        blocks, labels: basic blocks, and their places by label; the last place is the end.
        successors: places that follow a block if its branch is taken and if not.
        granule: smallest number of bytes of an access to shared memory, at most 16.
        stack: bytes of local memory of a thread.

    Raises:
        NotImplementedError: an instruction that the emulator does not have.
    """

    def __init__(self, ptx: str, name: str = r"\w+") -> None:
        text = re.sub(r"//[^\n]*|^\s*\.(loc|pragma)\b[^\n]*$", "", ptx, flags=re.MULTILINE)
        entry = rf"\.entry ({name})\((.*?)\).*?\{{(.*?)^\}}"
        found = re.search(entry, text, re.DOTALL | re.MULTILINE)
        assert found, "no kernel"
        self.name, parameters, body = found.groups()
        self.initial: list[Array | None] = []
        self.names: dict[str, int] = {}
        self.parameters: list[tuple[int, int, np.dtype]] = []
        self.blocks = [Block()]
        self.labels = {"exit": 0}
        self.declared: dict[str, str] = {}
        self.granule = 16
        self.stack = 0
        for symbol in ("global_smem", *_SHARED.findall(text)):
            self.slot(symbol, np.zeros(1, np.uint32))
        for special in _SPECIAL:
            self.slot(special, None)
        end = 0
        for align, kind, parameter, count in _PARAMETER.findall(parameters):
            dtype = dtype_of(kind)
            first, size = -(-end // int(align or dtype.itemsize)), dtype.itemsize * int(count or 1)
            first *= int(align or dtype.itemsize)
            self.slot(parameter, np.array([first], np.uint64))
            self.parameters.append((first, size, dtype))
            end = first + size
        for statement in body.split(";"):
            self._add(statement)
        self.labels["exit"] = len(self.blocks)
        self.successors = [
            (i + 1 if block.target is None else self.labels[block.target], i + 1)
            for i, block in enumerate(self.blocks)
        ]
        self.joins = self._joins()

    def _joins(self) -> list[int]:
        """For each block, the first block that all paths from it reach: its immediate postdominator."""
        end = len(self.blocks)
        after = [set(range(end + 1)) for _ in self.blocks] + [{end}]
        changed = True
        while changed:
            changed = False
            for i in reversed(range(end)):
                there, following = self.successors[i]
                found = set(after[there])
                if self.blocks[i].guard is not None:
                    found &= after[following]
                found.add(i)
                changed |= found != after[i]
                after[i] = found
        return [max(found - {i}, key=lambda j: len(after[j])) for i, found in enumerate(after[:-1])]

    def slot(self, name: str, initial: Array | None) -> int:
        if name not in self.names:
            self.names[name] = len(self.initial)
            self.initial.append(initial)
        return self.names[name]

    def _add(self, statement: str) -> None:
        # Braces are scopes; registers that are declared in one keep their type in all others.
        statement = statement.lstrip("{} \t\n")
        while label := _LABEL.match(statement):
            statement = statement[label.end() :].lstrip("{} \t\n")
            if not label[1].startswith(("$L__tmp", "$L__func")):
                if self.blocks[-1].steps:
                    self.blocks.append(Block())
                self.labels[label[1]] = len(self.blocks) - 1
        text = " ".join(statement.split())
        if not text:
            return
        if text.startswith(".reg"):
            kind, *names = text.removeprefix(".reg .").replace(",", " ").split()
            dtype = dtype_of(kind)
            kept = "?" if kind == "pred" else f"u{dtype.itemsize}"
            self.declared |= {x: kept for x in names if "<" not in x}
            return
        if stack := _STACK.fullmatch(text):
            self.slot(stack[1], np.zeros(1, np.uint64))
            self.stack = int(stack[2])
            return
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise NotImplementedError(text)
        negated, predicate, op, rest = found.groups()
        guard = (self.source(predicate, np.dtype("?")), negated == "!") if predicate else None
        operands = _operands(rest)
        if op.startswith(("bra", "ret")):
            self.blocks[-1].target = str(operands[0]) if operands else "exit"
            self.blocks[-1].guard = guard
            self.blocks.append(Block())
            return
        try:
            self.blocks[-1].steps.append(self._step(text, op, operands, guard))
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            raise NotImplementedError(f"{text}: {error!r}") from error

    def source(self, operand: Operand, dtype: np.dtype) -> int:
        """The register of an operand; dtype: that of a constant."""
        assert isinstance(operand, str)
        if (operand.startswith("%") and operand not in _SPECIAL) or operand in self.declared:
            return self.slot(operand, np.zeros(1, self._dtype(operand)))
        if operand in self.names:
            return self.names[operand]
        bits = int(operand[2:], 16) if operand[:2] in ("0f", "0d") else int(operand.rstrip("U"), 0)
        if dtype == "?":
            return self.slot(f"{operand}:{dtype}", np.array([bits != 0]))
        bits %= 1 << 8 * dtype.itemsize
        return self.slot(f"{operand}:{dtype.itemsize}", np.array([bits], f"u{dtype.itemsize}"))

    def destination(self, operand: Operand) -> tuple[int, np.dtype]:
        assert isinstance(operand, str)
        # Never read.
        dtype = self._dtype("%rd" if operand == "_" else operand)
        return self.slot(operand, np.zeros(1, dtype)), dtype

    def _dtype(self, register: str) -> np.dtype:
        return np.dtype(self.declared.get(register) or _DTYPES[register.rstrip("0123456789")])

    def address(self, operand: Operand) -> tuple[int, int]:
        """Register and offset of "[%r1 + 4]"."""
        assert isinstance(operand, str)
        base, _, offset = operand.strip("[] ").partition("+")
        return self.source(base.strip(), np.dtype("u4")), int(offset or "0", 0)

    def _step(self, text: str, op: str, operands: list[Operand], guard: Guard | None) -> Step:
        root, *modifiers = op.split(".")
        match root:
            case "ld" if "param" in modifiers:
                assert guard is None
                return self._load_parameter(modifiers, operands)
            case "ld" | "st":
                return self._access(text, root, modifiers, operands, guard)
            case "cp":
                return self._asynchronous(text, modifiers, operands, guard)
            case _:
                assert guard is None
        match root:
            case "mov" if isinstance(operands[0], list):
                return self._unpack(operands[0], self.source(operands[1], dtype_of(modifiers[-1])))
            case "mov" if isinstance(operands[1], list):
                return self._pack(operands[0], operands[1])
            case "mov" | "cvta":
                return self._copy(self.source(operands[1], dtype_of(modifiers[-1])), operands[0])
            case "setp" if "|" in operands[0]:
                return self._compare_halves(op, operands)
            case "bar" if modifiers == ["sync"]:
                return lambda _, group: group.shared.barrier(group.together(text, group.threads))
            case "bar":
                # Threads of a warp run in lock step here.
                return lambda _, group: None
            case "ldmatrix":
                return self._load_matrix(text, modifiers, operands)
            case "shfl" | "redux" | "mma" | "vote":
                return self._of_warps(text, root, modifiers, operands)
            case _:
                return self._compute(op, operands)

    def _compute(self, op: str, operands: list[Operand]) -> Step:
        found = operation(op, len(operands) - 1)
        sources = [
            (self.source(x, dtype), dtype)
            for x, dtype in zip(operands[1:], found.operands, strict=True)
        ]
        function = found.function
        target, dtype = self.destination(operands[0])

        def step(registers: Registers, _group: Group) -> None:
            values = [fit(registers[source], kind) for source, kind in sources]
            registers[target] = fit(function(*values), dtype)

        return step

    def _copy(self, source: int, operand: Operand) -> Step:
        target, dtype = self.destination(operand)

        def step(registers: Registers, _group: Group) -> None:
            registers[target] = fit(registers[source], dtype)

        return step

    def _load_parameter(self, modifiers: list[str], operands: list[Operand]) -> Step:
        names = operands[0] if isinstance(operands[0], list) else [operands[0]]
        targets = [self.destination(x) for x in names]
        dtype = np.dtype(f"u{dtype_of(modifiers[-1]).itemsize}")
        register, offset = self.address(operands[1])

        def step(registers: Registers, group: Group) -> None:
            (base,) = np.unique(registers[register]).astype(np.int64)
            first = int(base) + offset
            values = group.parameters[first : first + len(targets) * dtype.itemsize].view(dtype)
            for (target, kind), value in zip(targets, values, strict=True):
                registers[target] = fit(value.reshape(1), kind)

        return step

    def _unpack(self, operands: list[str], source: int) -> Step:
        targets = [self.destination(x)[0] for x in operands]

        def step(registers: Registers, _group: Group) -> None:
            whole = registers[source]
            parts = whole.view(f"u{whole.itemsize // len(targets)}").reshape(len(whole), -1)
            for target, part in zip(targets, parts.T, strict=True):
                registers[target] = np.ascontiguousarray(part)

        return step

    def _pack(self, operand: Operand, parts: list[str]) -> Step:
        target, dtype = self.destination(operand)
        small = np.dtype(f"u{dtype.itemsize // len(parts)}")
        sources = [self.source(x, small) for x in parts]

        def step(registers: Registers, _group: Group) -> None:
            found = np.stack(np.broadcast_arrays(*(registers[x] for x in sources)), -1)
            registers[target] = found.view(dtype).reshape(-1)

        return step

    def _compare_halves(self, op: str, operands: list[Operand]) -> Step:
        """A comparison of pairs of float16 with a predicate for each."""
        found = operation(op.removesuffix("x2"), 2)
        targets = [self.destination(x)[0] for x in str(operands[0]).split("|")]
        sources = [self.source(x, np.dtype("u4")) for x in operands[1:]]

        def step(registers: Registers, _group: Group) -> None:
            pairs = [registers[x].view("f2").reshape(-1, 2) for x in sources]
            for i, target in enumerate(targets):
                registers[target] = found.function(*(pair[:, i] for pair in pairs))

        return step

    def _access(
        self,
        text: str,
        root: str,
        modifiers: list[str],
        operands: list[Operand],
        guard: Guard | None,
    ) -> Step:
        """A load or a store."""
        # Generic addresses are those of the stack.
        space = modifiers[0] if modifiers[0] in ("global", "shared") else "local"
        assert space != "local" or modifiers[:-1] in ([], ["local"])
        dtype = np.dtype(f"u{dtype_of(modifiers[-1]).itemsize}")
        if space == "shared":
            self.granule = min(self.granule, dtype.itemsize)
        register, offset = self.address(operands[root == "ld"])
        values = operands[root == "st"]
        values = values if isinstance(values, list) else [values]
        if root == "ld":
            targets = [self.destination(x) for x in values]

            def load(registers: Registers, group: Group) -> None:
                access = group.access(registers, guard, text)
                address = access.address(registers[register], offset)
                found = group.spaces[space].load(access, address, dtype, len(targets))
                for (target, kind), column in zip(targets, found.T, strict=True):
                    registers[target] = access.merge(registers[target], fit(column, kind))

            return load
        sources = [self.source(x, dtype) for x in values]

        def store(registers: Registers, group: Group) -> None:
            access = group.access(registers, guard, text)
            address = access.address(registers[register], offset)
            columns = [access.of(fit(registers[source], dtype)) for source in sources]
            group.spaces[space].store(access, address, np.stack(columns, -1))

        return store

    def _asynchronous(
        self, text: str, modifiers: list[str], operands: list[Operand], guard: Guard | None
    ) -> Step:
        if "commit_group" in modifiers:
            return lambda _, group: group.shared.commit(group.access([], None, text))
        if "wait_group" in modifiers:
            left = int(str(operands[0]), 0)
            return lambda _, group: group.shared.wait(group.access([], None, text), left)
        assert modifiers == ["async", modifiers[1], "shared", "global"], "another kind of copy"
        (target, at), (source, start) = map(self.address, operands[:2])
        size = int(str(operands[2]), 0)
        self.granule = min(self.granule, size)
        # The number of bytes that are read, or a predicate: nothing is.
        used = self.source(operands[-1], np.dtype("u4"))

        def step(registers: Registers, group: Group) -> None:
            access = group.access(registers, guard, text)
            counts = access.of(registers[used])
            if counts.dtype == bool:
                counts = np.where(counts, 0, size)
            assert np.isin(counts, (0, size)).all(), "a copy of a part"
            some = access.where(counts > 0)
            address = some.address(registers[source], start)
            words = group.spaces["global"].load(some, address, np.dtype("u4"), size // 4)
            values = np.zeros((len(counts), size), np.uint8)
            values[counts > 0] = words.view("u1")
            group.shared.copy(access, access.address(registers[target], at), values)

        return step

    def _load_matrix(self, text: str, modifiers: list[str], operands: list[Operand]) -> Step:
        names = operands[0] if isinstance(operands[0], list) else [operands[0]]
        targets = [self.destination(x)[0] for x in names]
        register, offset = self.address(operands[1])
        transposed = "trans" in modifiers

        def step(registers: Registers, group: Group) -> None:
            access = group.together(text, 32)
            access = access.where(group.lane[access.threads] < 8 * len(targets))
            address = access.address(registers[register], offset)
            rows = group.shared.load(access, address, np.dtype("u2"), 8)
            found = group.fragments(access, rows, transposed)
            for target, value in zip(targets, found, strict=True):
                registers[target] = value

        return step

    def _of_warps(
        self, text: str, root: str, modifiers: list[str], operands: list[Operand]
    ) -> Step:
        """A shuffle, a reduction over a warp or a matrix product."""
        word = np.dtype("u4")
        # The predicate of "%r1|%p1", whether the source is in range, is true here.
        groups = [x if isinstance(x, list) else [x.split("|")[0]] for x in operands]
        targets = [self.destination(x)[0] for x in groups[0]]
        sources = [[self.source(x, word) for x in group] for group in groups[1:]]

        def step(registers: Registers, group: Group) -> None:
            group.together(text, 32)
            values = [[registers[x] for x in each] for each in sources]
            for target, value in zip(
                targets, getattr(group, root)(modifiers, *values), strict=True
            ):
                registers[target] = value

        return step


def _operands(text: str) -> list[Operand]:
    """Split at commas outside of braces; {a, b} becomes a list."""
    found: list[Operand] = []
    for group, single in re.findall(r"\{([^}]*)\}|([^,{}]+)", text):
        if group:
            found.append([x.strip() for x in group.split(",")])
        elif single.strip():
            found.append(single.strip())
    return found
