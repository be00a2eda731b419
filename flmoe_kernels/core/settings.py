"""Process-wide settings that a `with` block can override.

For settings that kernels read: autograd runs the backward passes of a GPU in threads of its own, which do not have
the context variables of the thread that entered the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class _Scope(Generic[Value]):
    """The value of a `with` block; equal only to itself."""

    def __init__(self, value: Value) -> None:
        self.value = value


class ScopedSetting(Generic[Value]):
    """A value for all threads; the override that was entered last applies."""

    def __init__(self, default: Value) -> None:
        self.default = default
        # append and remove are atomic.
        self._scopes: list[_Scope[Value]] = []

    def get(self) -> Value:
        scopes = self._scopes[-1:]
        return scopes[0].value if scopes else self.default

    @contextmanager
    def override(self, value: Value) -> Iterator[None]:
        scope = _Scope(value)
        self._scopes.append(scope)
        try:
            yield
        finally:
            # Remove this block's scope, not the last scope: the blocks of two threads may overlap.
            self._scopes.remove(scope)
