"""Compiles cases in a few processes of their own; equal kernels once, whatever cases they serve."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import IO

from bench.aot.architectures import Architecture
from bench.aot.cases import CASES, Case
from flmoe_kernels.core.triton.launches import Report

# One for each core that is usual where this runs; each holds a gigabyte.
PROCESSES = 2
# A case on an architecture.
Job = tuple[Case, Architecture]


class CompilerFailed(RuntimeError):
    """A kernel that did not compile; the message is what the compiler said."""


class Worker:
    """One process that compiles, started anew where the compiler ended it."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[str] | None = None
        # Not a pipe, which a compiler that says much would fill.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def compile(self, job: Job) -> Report:
        case, architecture = job
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended, which its answer shows.
            process.stdin.write(f"{architecture.number} {case.name}\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self._process = None
            raise CompilerFailed(f"the compiler's process ended with {code}\n{self._said()}")
        found = json.loads(line)
        if "error" in found:
            raise CompilerFailed(found["error"])
        return Report(**found["report"])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.aot.worker", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=_environment(),
            )
        return self._process

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-4000:]


def _environment() -> dict[str, str]:
    """Without the interpreter, and with this process's modules."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def compile_cases(
    jobs: Sequence[Job],
    *,
    module: str = CASES,
    processes: int = PROCESSES,
    done: Callable[[int], None] = lambda _: None,
) -> dict[tuple[str, int], Report | str]:
    """What the compiler made of each job, or what it said, by case and architecture.

    module: the one that lists the cases. done: told how many jobs each compilation served.
    """
    same: dict[str, list[Job]] = {}
    for case, architecture in jobs:
        key = case.built(architecture).launch.specialization(architecture.number)
        same.setdefault(key, []).append((case, architecture))
    workers: SimpleQueue[Worker] = SimpleQueue()
    every = [Worker(module) for _ in range(max(1, min(processes, len(same))))]
    for worker in every:
        workers.put(worker)

    def compile_first(group: list[Job]) -> Report | str:
        worker = workers.get()
        try:
            return worker.compile(group[0])
        except CompilerFailed as error:
            return str(error)
        finally:
            workers.put(worker)
            done(len(group))

    pool = ThreadPoolExecutor(len(every))
    try:
        reports = list(pool.map(compile_first, same.values()))
    finally:
        # Where someone interrupts, what waits is dropped and what runs is ended.
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in every:
            worker.close()
    return {
        (case.name, architecture.number): report
        for group, report in zip(same.values(), reports, strict=True)
        for case, architecture in group
    }
