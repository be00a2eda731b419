"""Settings of the process: environment variables, and values that a `with` block can override.

A block's value holds in all threads: autograd runs the backward passes of a GPU in its own threads, which do not
have the context variables of the thread that entered the block.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")
PACKAGE = __name__.partition(".")[0]


def environment_choice(name: str, choices: Sequence[str]) -> str | None:
    """The value of an environment variable that the import reads; None if it is unset or empty.

    Raises:
        ValueError: the value is not one of the choices. While Python imports the package for `python -m
            flmoe_kernels`, no command can report the error yet: it is printed in one line, and the exit code is 2.
    """
    value = os.environ.get(name) or None
    if value is None or value in choices:
        return value
    message = f"{name}: expected one of {', '.join(choices)}, got {value!r}"
    if _is_started_by_option_m():
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ValueError(message)


def _is_started_by_option_m() -> bool:
    # Until the module is located, sys.argv[0] is "-m"; the module's name is the argument before sys.argv[1:].
    module = sys.orig_argv[-len(sys.argv)] if sys.argv[:1] == ["-m"] else ""
    return module.removeprefix("-m") == PACKAGE


class _Scope(Generic[Value]):
    """The value of a `with` block; compared by identity."""

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
