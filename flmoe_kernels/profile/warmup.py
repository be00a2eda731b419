"""Compilation of Triton kernels before their first call, in parallel processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flmoe_kernels.core.backend import TRITON, BackendUnavailable
from flmoe_kernels.core.triton.release import unsuitable_reason
from flmoe_kernels.core.triton.tables import architecture_of
from flmoe_kernels.core.triton.target import TARGETS, Target, architecture_name

from .cases import BadRequest, Case
from .registry import operator_module, words_of
from .shapes import is_cuda, on_device

if TYPE_CHECKING:
    from flmoe_kernels.core.triton.recording import Kernel

# Imported once, before the workers are forked.
_PRELOADED = ("flmoe_kernels.core.triton.recording",)


@dataclass(frozen=True)
class Warmed:
    """Numbers of kernels that were compiled, and that were in Triton's cache; messages of those that failed."""

    compiled: int
    found: int
    failures: tuple[str, ...]


def target_of(name: str | None) -> Target:
    """The GPU named sm_90 or similar; for None, the GPU of this machine.

    Raises:
        BadRequest: another name, or there is no GPU.
    """
    if name is None:
        if not torch.cuda.is_available():
            raise BadRequest("target: expected a name such as sm_90, since there is no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        return Target(architecture_of(device) or 0, properties.multi_processor_count)
    known = {architecture_name(key): target for key, target in TARGETS.items()}
    if name in known:
        return known[name]
    match = re.fullmatch(r"sm_(\d+)", name)
    older = [x for x in TARGETS if isinstance(x, int) and match and x <= int(match[1])]
    if match is None or not older:
        raise BadRequest(f"target: expected a name such as {', '.join(known)}, got {name!r}")
    # Of an unknown GPU only the number of multiprocessors is a guess.
    return dataclasses.replace(TARGETS[max(older)], architecture=int(match[1]))


def call_of(case: Case, *, outputs: bool = False) -> Callable[[], object]:
    """A function that makes inputs of a case with the sizes of a GPU, on the CPU, and calls the Triton kernels.

    outputs: also compute the results of the correctness check, which uses further variants of kernels.
    """
    shape = on_device(case.shape, "cuda") if is_cuda(case.device) else case.shape
    stand_in = dataclasses.replace(case, shape=shape, device="cpu")

    def call() -> None:
        prepared = operator_module(case.operator).prepare(stand_in, TRITON, case.dtype)
        prepared.call()
        if outputs:
            prepared.outputs()

    return call


def warm_up(calls: Iterable[Callable[[], object]], target: Target, jobs: int) -> Warmed:
    """Compile the kernels of calls on CPU tensors, which stand for those of a GPU, into Triton's cache.

    The calls run in this process without computing anything; each kernel is compiled as soon as it is known.

    Args:
        calls: functions that call operators or layers with backend "triton".
        jobs: number of processes; each takes about one gigabyte.

    Raises:
        BackendUnavailable: Triton is not installed, or too old.
        RuntimeError: kernels run in Triton's interpreter in this process (TRITON_INTERPRET=1).
    """
    if reason := unsuitable_reason():
        raise BackendUnavailable(f"warmup: {reason}")
    from flmoe_kernels.core.triton.recording import recorded

    # Workers are forked from a process that has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED])
    futures: dict[Kernel, Future[bool]] = {}
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            for call in calls:
                with recorded(target) as kernels:
                    call()
                for kernel in kernels:
                    if kernel not in futures:
                        futures[kernel] = pool.submit(kernel.compile, target.architecture)
            wait(futures.values())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    compiled, found, failures = 0, 0, []
    for kernel, future in futures.items():
        if error := future.exception():
            failures.append(f"{kernel.name}: {words_of(error)}")
        elif future.result():
            found += 1
        else:
            compiled += 1
    return Warmed(compiled, found, tuple(failures))
