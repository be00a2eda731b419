"""Settings of the process that a `with` block overrides."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ScopedSetting(Generic[Value]):
    """A value that holds for every thread; the override entered last wins."""

    def __init__(self, default: Value) -> None:
        self.default = default
        # Replaced, never changed, so that reading it needs no lock.
        self._scopes: list[list[Value]] = []
        self._lock = threading.Lock()

    def get(self) -> Value:
        return self._scopes[-1][0] if self._scopes else self.default

    @contextmanager
    def override(self, value: Value) -> Iterator[None]:
        scope = [value]
        with self._lock:
            self._scopes = [*self._scopes, scope]
        try:
            yield
        finally:
            # This block's own scope, not the last one: blocks of two threads need not be nested.
            with self._lock:
                self._scopes = [other for other in self._scopes if other is not scope]
