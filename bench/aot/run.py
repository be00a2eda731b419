"""From a request to rows and an exit code: what the command `aot` does once its options are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import triton

from bench.aot.architectures import Architecture
from bench.aot.budget import EMPTY, Budget, failures
from bench.aot.cases import CASES, Case, chosen, listed
from bench.aot.compile import PROCESSES, Job, compile_cases
from bench.aot.rows import Row, rows_of


@dataclass(frozen=True)
class Request:
    """Cases of these operators, shapes and dtypes (all where none is named), for these architectures.

    quick: only what the quick set of each case says. module: the one that lists the cases.
    """

    architectures: Sequence[Architecture]
    operators: Collection[str] = ()
    shapes: Collection[str] = ()
    dtypes: Collection[str] = ()
    quick: bool = False
    module: str = CASES

    def jobs(self) -> list[Job]:
        """Raises ValueError where a name is not known or nothing is left."""
        every: list[Case] = list(listed(self.module).values())
        cases = chosen(every, self.operators, self.shapes, self.dtypes)
        found = [
            (case, architecture)
            for case in cases
            for architecture in self.architectures
            if not self.quick or architecture.number in case.quick
        ]
        if not found:
            raise ValueError("no case is of this operator, shape and dtype")
        return found


def compile_rows(
    request: Request,
    budget: Budget = EMPTY,
    *,
    processes: int = PROCESSES,
    done: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """The rows of a request with what is wrong with each."""
    jobs = request.jobs()
    reports = compile_cases(jobs, module=request.module, processes=processes, done=done)
    return judged(rows_of(jobs, reports), budget)


def judged(rows: Collection[Row], budget: Budget) -> list[Row]:
    return [
        dataclasses.replace(row, failures=failures(row, budget, triton.__version__)) for row in rows
    ]
