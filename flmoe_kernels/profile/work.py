"""Counts FLOP and bytes of every operator of a call; the operators run more slowly meanwhile.

FLOP are those of matrix products, from the formulas of torch.utils.flop_counter. Bytes are those of the operator's
inputs and results, each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flmoe_kernels.core import flops

MARK = "flmoe_kernels.profile: work"


class Counting(TorchDispatchMode):
    """Adds an empty range named "MARK FLOP bytes" to the profiler's range of each operator.

    An operator with several steps has the ranges in its steps instead.
    """

    steps = 0

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
            _mark(flop, [args, kwargs, out])
        return out

    def _step(self, flop: int, values: Sequence[Any]) -> None:
        self.steps += 1
        _mark(flop, values)


def _mark(flop: int, values: Sequence[Any]) -> None:
    tensors = {id(x): x.nbytes for x in tree_leaves(values) if isinstance(x, Tensor)}
    with record_function(f"{MARK} {flop} {sum(tensors.values())}"):
        pass
