"""FLOP formulas of operators for torch.utils.flop_counter.FlopCounterMode.

As in torch, only matrix products count, 2 FLOP for a multiply-add. Formulas take the operator's arguments without
the backend: they count what the mathematics needs, which is the same on every backend.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

Formula = Callable[..., int]
_COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[Any, Formula]] = []
# Gets name, FLOP, arguments and results of every step of an operator that has several steps; set by the profiler.
observer: Callable[[str, int, Sequence[Any], Any], None] | None = None


def no_products(*_args: Any) -> int:
    """Formula of an operator without matrix products."""
    return 0


def values_of(x: Tensor) -> list[int] | None:
    """The values of an integer tensor; None if it has none (fake tensors, meta). Synchronizes with a GPU."""
    if isinstance(x, FakeTensor | FunctionalTensor) or x.device.type == "meta":
        return None
    values: list[int] = x.tolist()
    return values


def register(operator: Any, formula: Formula, count: int) -> None:
    """Give an operator of torch.ops a formula of its first `count` arguments."""

    def flops(*args: Any, out_val: Any = None, **_kwargs: Any) -> int:
        return formula(*args[:count])

    _formulas.append((operator, flops))
    if counter := sys.modules.get(_COUNTER):
        counter.register_flop_formula(operator, get_raw=True)(flops)


class _OnImport(MetaPathFinder):
    """Registers the formulas whenever torch's counter is loaded.

    The package does not import the counter itself, because the counter imports Triton, which takes long.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (x.find_spec(name, path, target) for x in others)), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            for operator, flops in _formulas:
                module.register_flop_formula(operator, get_raw=True)(flops)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _OnImport())
