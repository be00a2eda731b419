"""What an error says, in one line."""

from __future__ import annotations

_MOST = 300


def words_of(error: BaseException) -> str:
    """The first line, or the type where there is none; and the next one, where the first only announces it.

    torch.compile's errors begin with "backend='inductor' raised:".
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:_MOST]
