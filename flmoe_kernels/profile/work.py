"""Work of a call and of its operators: FLOP, bytes and exponentials, counted while they run.

FLOP are those of matrix products, from the formulas of torch.utils.flop_counter. Bytes are those of an operator's
inputs and results, each once. Exponentials are those of the softmax, which can limit a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flmoe_kernels.core import flops
from flmoe_kernels.core.backend import REFERENCE, BackendUnavailable

from .cases import Case
from .registry import default_ours, find, prepare

MARK = "flmoe_kernels.profile: work"
OURS = "flmoe::"


@dataclass(frozen=True)
class Cost:
    """Work of a call. exponentials: of the softmax in the forward, and again if the backward recomputes it."""

    flop: int = 0
    bytes: int = 0
    exponentials: int = 0

    def __add__(self, other: Cost) -> Cost:
        exponentials = self.exponentials + other.exponentials
        return Cost(self.flop + other.flop, self.bytes + other.bytes, exponentials)


@functools.lru_cache(maxsize=8)
def cost(case: Case) -> Cost:
    """Count the work of one call in this package's operators: the same for all contestants, without padding.

    Without a backend for the case, the work of the reference is counted.
    """
    try:
        contestant = default_ours(case)
    except BackendUnavailable:
        contestant = find(case, REFERENCE)
    call = prepare(case, contestant).call
    with Counting() as counting:
        call()
    return counting.ours if counting.ours != Cost() else counting.torch


class Counting(TorchDispatchMode):
    """Sums the work of operators: `ours` of this package, `torch` of others.

    Within each operator's range of torch's profiler it adds an empty range named MARK and three numbers. An
    operator with several steps has these ranges in its steps instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ours = self.torch = Cost()
        self.steps = 0

    def __enter__(self) -> Counting:
        flops.observer = self._step
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        flops.observer = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, before = kwargs or {}, self.steps
        out = func(*args, **kwargs)
        if self.steps == before and func.namespace != "profiler" and not func.is_view:
            formula = flop_registry.get(func._overloadpacket)
            flop = formula(*args, **kwargs, out_val=out) if formula else 0
            self._add(func._schema.name, flop, [*args, *kwargs.values()], out)
        return out

    def _step(self, name: str, flop: int, args: Sequence[Any], results: Any) -> None:
        self.steps += 1
        self._add(name, flop, args, results)

    def _add(self, name: str, flop: int, args: Sequence[Any], results: Any) -> None:
        leaves = tree_leaves([args, results])
        sizes = {id(x): x.nbytes for x in leaves if isinstance(x, Tensor)}
        work = Cost(flop, sum(sizes.values()), _exponentials(name, flop, args))
        if name.startswith(OURS):
            self.ours += work
        else:
            self.torch += work
        with record_function(f"{MARK} {work.flop} {work.bytes} {work.exponentials}"):
            pass


def _exponentials(name: str, flop: int, args: Sequence[Any]) -> int:
    shapes = [x.shape for x in args if isinstance(x, Tensor) and x.ndim >= 4]
    if name.startswith(f"{OURS}expert_attention"):
        # One per score. A score takes 4 d FLOP for head width d, or 10 d in the backward.
        return flop // ((10 if "backward" in name else 4) * shapes[0][-1])
    if name in (f"{OURS}pair_moe", f"{OURS}pair_moe_backward"):
        q, k, *_ = shapes[-4:]
        return q[:3].numel() * k[2]
    return 0
