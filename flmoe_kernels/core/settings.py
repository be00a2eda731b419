"""Settings of the process that a `with` block overrides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class _Scope(Generic[Value]):
    """The value of one block; equal only to itself."""

    def __init__(self, value: Value) -> None:
        self.value = value


class ScopedSetting(Generic[Value]):
    """A value that holds for every thread; the override entered last wins."""

    def __init__(self, default: Value) -> None:
        self.default = default
        # append and remove are atomic. A lock could not be traced by torch.compile.
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
            # This block's own scope, not the last one: blocks of two threads need not be nested.
            self._scopes.remove(scope)
