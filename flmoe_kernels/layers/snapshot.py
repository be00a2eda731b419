"""Fast detection of changes in the parts of a layer.

The kernels compute from the parameters of a layer's parts and never call the parts, so every call has to check
that no part has changed. A full check takes longer than a small layer does; this one takes microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from flmoe_kernels.core.native import cpu_unavailable_reason, native

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Attributes that the layer reads in every call, or that a call sets.
_READ = ("training", "last_attn")
_ANY, _END = object(), object()


def global_hooks() -> list[dict[int, Any]]:
    """torch's hooks on all modules, by kind."""
    return [getattr(torch_module, "_global" + name) for name in HOOKS]


def has_global_hook() -> bool:
    """Whether a hook on all modules is registered, except those of torch's ModuleTracker.

    FlopCounterMode uses a ModuleTracker, which records what module runs and changes nothing.
    """
    hooks = (hook for kind in global_hooks() for hook in kind.values())
    return any(type(getattr(hook, "__self__", None)) is not ModuleTracker for hook in hooks)


class PartsSnapshot:
    """State of the parts of a layer at one time.

    It covers the modules and their classes, every attribute, hooks, which parameters and buffers exist, their
    types, and the attributes of the classes. It does not cover the values and shapes of tensors and the modes,
    which the layer reads in every call. A change can be harmless, for example a new attribute that nothing reads.

    Args:
        parts: the modules, without hooks and buffers; each without its children.
        children, parameters: other dictionaries of modules and of parameters.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        children: Sequence[dict[str, Any]],
        parameters: Sequence[dict[str, Any]],
    ) -> None:
        states = [vars(part) for part in parts]
        modules = [*children, *(state["_modules"] for state in states)]
        hooks = [state[name] for state in states for name in (*HOOKS, "_buffers")]
        self._empty = (*hooks, *(each for each in modules if not each), *global_hooks())
        self._dicts = (*states, *(each for each in modules if each))
        self._values = _flat(self._dicts, lambda key, value: _ANY if key in _READ else value)
        self._tensors = (*parameters, *(state["_parameters"] for state in states))
        self._types = _flat(self._tensors, lambda _, value: type(value))
        self._parts, self._part_types = tuple(parts), tuple(map(type, parts))
        self._states = tuple(states)
        self._classes = tuple(dict.fromkeys(map(type, parts)))
        for kind in self._classes:
            getattr(kind, "forward", None)  # a class has a version after a lookup
        self._native = None if cpu_unavailable_reason() else native()
        self._versions = self._native and self._native.class_versions(self._classes)
        self._all_dicts = (*self._dicts, *self._empty, *self._tensors)
        self._dict_versions = self._native and self._native.dict_versions(self._all_dicts)

    def unchanged(self) -> bool:
        """Whether nothing has changed since the snapshot; False without the native module."""
        module = self._native
        if module is None or module.class_versions(self._classes) != self._versions:
            return False
        versions = module.dict_versions(self._all_dicts)
        if not versions or versions != self._dict_versions:
            # An item was set. It may be a mode, or the same value again, so compare the values.
            same = (
                module.same_types(self._tensors, self._types, _ANY, _END)
                and module.all_empty(self._empty)
                and module.same_values(self._dicts, self._values, _ANY, _END)
            )
            if not same:
                return False
            self._dict_versions = versions
        same_parts: bool = module.same_objects(self._parts, self._part_types, self._states)
        return same_parts


def _flat(dicts: Sequence[dict[Any, Any]], recorded: Callable[[Any, Any], Any]) -> tuple[Any, ...]:
    def items() -> Iterator[Any]:
        for each in dicts:
            yield from (recorded(key, value) for key, value in each.items())
            yield _END

    return tuple(items())
