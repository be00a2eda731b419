"""Execution of a program by groups of CTAs in lock step, and the instructions of warps."""

from __future__ import annotations

import numpy as np

from .arithmetic import Array, widen_bfloat16
from .memory import Access, Findings, GlobalMemory, LocalMemory, SharedMemory
from .program import Block, Guard, Program, Registers

# Threads that run in lock step, for the speed of NumPy.
_THREADS = 4096


def run(
    program: Program,
    memory: GlobalMemory,
    parameters: Array,
    ctas: int,
    warps: int,
    shared: int,
    findings: Findings,
) -> None:
    """Run all CTAs of a launch; parameters: their bytes; shared: bytes of shared memory of each."""
    together = max(1, _THREADS // (32 * warps))
    with np.errstate(all="ignore"):
        for first in range(0, ctas, together):
            numbers = np.arange(first, min(first + together, ctas))
            of_group = SharedMemory(len(numbers), shared, program.granule, warps)
            group = Group(program, memory, of_group, findings, numbers, 32 * warps, parameters)
            special = {
                "%tid.x": group.thread.astype(np.uint32),
                "%ntid.x": np.array([32 * warps], np.uint32),
                "%ctaid.x": group.cta.astype(np.uint32),
                "%nctaid.x": np.array([ctas], np.uint32),
            }
            registers = [
                special[name] if initial is None else initial
                for name, initial in zip(program.names, program.initial, strict=True)
            ]
            group.run(registers)


class Group:
    """CTAs that run in lock step, with the CTA, warp and lane of each thread."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        shared: SharedMemory,
        findings: Findings,
        ctas: Array,
        threads: int,
        parameters: Array,
    ) -> None:
        self.program, self.shared, self.findings = program, shared, findings
        self.parameters = parameters
        self.threads, self.count = threads, len(ctas) * threads
        local = LocalMemory(self.count, program.stack)
        self.spaces: dict[str, GlobalMemory | SharedMemory | LocalMemory]
        self.spaces = {"global": memory, "shared": shared, "local": local}
        self.mask: Array | None = None
        self.everyone = np.arange(self.count)
        self.block, self.thread = np.divmod(self.everyone, threads)
        self.cta, self.warp, self.lane = ctas[self.block], self.thread // 32, self.thread % 32

    def run(self, registers: Registers) -> None:
        """Run to the end. Threads that branch apart meet at the first block that all of them reach."""
        program = self.program
        # Block, active threads, block to stop at.
        waiting = [(0, np.ones(self.count, bool), len(program.blocks))]
        while waiting:
            number, active, stop = waiting.pop()
            while number != stop:
                block = program.blocks[number]
                self._run_block(block, registers, active)
                there, after = program.successors[number]
                taken = active
                if block.guard is not None:
                    taken = active & self._holds(registers, block.guard)
                if (taken == active).all():
                    number = there
                elif not taken.any():
                    number = after
                else:
                    meet = program.joins[number]
                    waiting += [(meet, active, stop), (after, active & ~taken, meet)]
                    number, active, stop = there, taken, meet

    def _run_block(self, block: Block, registers: Registers, active: Array) -> None:
        """Only registers of active threads change."""
        self.mask = None if active.all() else active
        before = list(registers)
        for step in block.steps:
            step(registers, self)
        if self.mask is not None:
            for i, (old, new) in enumerate(zip(before, registers, strict=True)):
                if old is not new:
                    registers[i] = np.where(active, new, old)

    @staticmethod
    def _holds(registers: Registers, guard: Guard) -> Array:
        register, negated = guard
        return registers[register] ^ negated

    def access(self, registers: Registers, guard: Guard | None, text: str) -> Access:
        """An access by the threads that are active and whose guard holds."""
        active = np.True_ if self.mask is None else self.mask
        if guard is not None:
            active = active & self._holds(registers, guard)
        return Access(self, self.everyone[np.broadcast_to(active, self.count)], text)

    def together(self, text: str, threads: int) -> Access:
        """An access by all active threads, which must be whole warps or CTAs."""
        access = self.access([], None, text)
        if self.mask is not None:
            parts = self.mask.reshape(-1, threads)
            apart = np.repeat(parts.any(1) & ~parts.all(1), threads)
            access.report("threads have branched apart", apart[access.threads])
        return access

    def _warps(self, register: Array) -> Array:
        return np.broadcast_to(register, self.count).reshape(-1, 32)

    def fragments(self, access: Access, rows: Array, transposed: bool) -> list[Array]:
        """Result words of ldmatrix for each thread, from the rows of the 8 x 8 matrices of 16-bit values."""
        warps = np.unique(access.threads // 32)
        matrices = rows.reshape(len(warps), -1, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.zeros((matrices.shape[1], self.count // 32, 32), np.uint32)
        words[:, warps] = (
            np.ascontiguousarray(matrices).view("u4").reshape(len(warps), -1, 32).swapaxes(0, 1)
        )
        return list(words.reshape(len(words), -1))

    def shfl(self, modifiers: list[str], values: Registers, *rest: Registers) -> list[Array]:
        (operand,), (clamp,), _ = rest
        by, lane = operand.astype(np.int64) & 31, self.lane
        active = ... if self.mask is None else self.mask
        clamp = np.broadcast_to(clamp, self.count)[active]
        assert (clamp == (0 if modifiers[1] == "up" else 31)).all(), "a part of a warp"
        match modifiers[1]:
            case "up":
                source = np.where(by > lane, lane, lane - by)
            case "bfly":
                source = lane ^ by
            case "idx":
                source = np.broadcast_to(by, self.count)
            case _:
                raise NotImplementedError(f"shfl.{modifiers[1]}")
        return [np.broadcast_to(values[0], self.count)[self.everyone - lane + source]]

    def redux(self, modifiers: list[str], values: Registers, _members: Registers) -> list[Array]:
        """A reduction of signed integers over each warp."""
        assert modifiers[2] == "s32"
        function = {"add": np.add, "min": np.minimum, "max": np.maximum}[modifiers[1]]
        found = function.reduce(self._warps(values[0]).view("i4"), axis=1, dtype=np.int32)
        return [np.repeat(found.view("u4"), 32)]

    def vote(self, modifiers: list[str], values: Registers, _members: Registers) -> list[Array]:
        """A bit of each lane."""
        assert modifiers == ["sync", "ballot", "b32"]
        bits = self._warps(values[0]).astype(np.uint32) << np.arange(32, dtype=np.uint32)
        return [np.repeat(np.bitwise_or.reduce(bits, axis=1), 32)]

    def mma(self, modifiers: list[str], *operands: Registers) -> list[Array]:
        """A matrix product of each warp: exact products, added in float64 and rounded once."""
        shape, result, left_kind, right_kind, added = (modifiers[i] for i in (2, 5, 6, 7, 8))
        assert (result, left_kind, added) == ("f32", right_kind, "f32")
        assert shape == ("m16n8k8" if left_kind == "tf32" else "m16n8k16")
        kinds = left_kind, right_kind, "f32"
        left, right, total = (
            self._matrix(*each) for each in zip(operands, kinds, _PLACES[left_kind], strict=True)
        )
        found = np.empty((self.count // 32, 128), np.float32)
        found[:, _PLACES[left_kind][2]] = left @ right + total
        words = found.view("u4").reshape(self.count, 4)
        return [np.ascontiguousarray(words[:, i]) for i in range(4)]

    def _matrix(self, registers: Registers, kind: str, places: Array) -> Array:
        """The matrix of each warp in registers, in float64."""
        words = np.stack([self._warps(x) for x in registers], -1)
        match kind:
            case "bf16":
                values = widen_bfloat16(words.view("u2"))
            case "f16":
                values = words.view("f2")
            case "tf32":
                # The hardware ignores the other bits.
                values = (words & np.uint32(0xFFFFE000)).view("f4")
            case _:
                values = words.view("f4")
        return values.reshape(len(words), -1)[:, places].astype(np.float64)


def _places() -> dict[str, tuple[Array, Array, Array]]:
    """For each kind of mma, the index of every element of A, B and C in the warp's fragments, ordered by lane."""
    lane = np.arange(32)[:, None]
    row, column = lane // 4, lane % 4

    def place(shape: tuple[int, int], rows: Array, columns: Array) -> Array:
        found = np.full(shape, -1)
        found[rows, columns] = np.arange(rows.size).reshape(rows.shape)
        assert (found >= 0).all()
        return found

    two, four, eight = np.arange(2), np.arange(4), np.arange(8)
    result = place((16, 8), row + 8 * (four // 2), 2 * column + four % 2)
    halves = (
        place((16, 16), row + 8 * (eight // 2 % 2), 2 * column + eight % 2 + 8 * (eight // 4)),
        place((16, 8), 2 * column + four % 2 + 8 * (four // 2), row + 0 * four),
        result,
    )
    tf32 = (
        place((16, 8), row + 8 * (four % 2), column + 4 * (four // 2)),
        place((8, 8), column + 4 * two, row + 0 * two),
        result,
    )
    return {"bf16": halves, "f16": halves, "tf32": tf32}


_PLACES = _places()
