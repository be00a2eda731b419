"""Fast detection of changes in the parts of a layer.

The kernels compute from the parameters of a layer's parts and never call the parts, so every call has to check
that no part has changed. A full check takes longer than a small layer does. This one compares only references
and sizes, in the C loops of the interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = tuple("_global" + name for name in HOOKS)


def global_hooks() -> list[Mapping[int, Any]]:
    """torch's hooks on all modules, by kind."""
    return [getattr(torch_module, name) for name in GLOBAL_HOOKS]


class PartsSnapshot:
    """State of the parts of a layer; `unchanged` compares it with the present state in microseconds.

    It covers the modules, their classes, all kinds of hooks, buffers, the numbers of parameters and of attributes,
    and the values of the attributes in `numbers`. It does not cover what is read in every call: values and shapes
    of parameters, modes, dropout rates. A change can be harmless, for example a new attribute that nothing reads;
    then the caller takes a new snapshot.

    Args:
        roots: the parts and everything below them.
        holder: the module whose children are the roots.
        numbers: attributes that the mathematics uses, by class of the part.
    """

    def __init__(
        self,
        holder: nn.Module,
        roots: Sequence[nn.Module],
        numbers: Mapping[type[nn.Module], tuple[str, ...]],
    ) -> None:
        parts = [part for root in roots for part in root.modules()]
        self._parts, self._types = parts, list(map(type, parts))
        self._sized = [vars(part) for part in parts]
        # A parameter that is new in a part without parameters changes nothing.
        self._sized += [part._parameters for part in parts if part._parameters]
        self._sizes = list(map(len, self._sized))
        self._children = [part._modules for part in (holder, *parts) if part._modules]
        self._same_children = [dict(children) for children in self._children]
        self._empty: list[Any] = [part._modules for part in parts if not part._modules]
        self._empty += [getattr(part, name) for part in parts for name in ("_buffers", *HOOKS)]
        self._empty += global_hooks()
        self._values = [
            (vars(part), name) for part in parts for name in numbers.get(type(part), ())
        ]
        self._values += [
            (part._parameters, name)
            for part in parts
            for name, parameter in part._parameters.items()
            if parameter is None
        ]
        self._same_values = [values[name] for values, name in self._values]
        kinds: set[Any] = set(self._types)
        self._forwards = [(kind, kind.forward) for kind in kinds]

    def unchanged(self) -> bool:
        """Whether nothing has changed since the snapshot."""
        try:
            return (
                list(map(type, self._parts)) == self._types
                and list(map(len, self._sized)) == self._sizes
                and not any(self._empty)
                and self._children == self._same_children
                and [values[name] for values, name in self._values] == self._same_values
                and [(kind, kind.forward) for kind, _ in self._forwards] == self._forwards
            )
        except KeyError:
            return False
