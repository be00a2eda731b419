"""Check of calls that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Mistake = tuple[Callable[[], object], str]


def assert_refused(call: Callable[[], object], message: str) -> None:
    """The call raises ValueError, or TypeError if the pattern of its message begins with this name."""
    kind = TypeError if message.startswith("TypeError: ") else ValueError
    with pytest.raises(kind, match=message.removeprefix("TypeError: ")):
        call()
