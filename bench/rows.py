"""Result files of this folder: JSON with one row per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flmoe_kernels.core.files import write_whole


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically, with one line per list item. NaN and infinity raise ValueError."""
    text = "{\n" + ",\n".join(f"{json.dumps(k)}: {_lines(v)}" for k, v in content.items()) + "\n}\n"
    write_whole(path, text, make_folder=True)


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in value) + "\n]"
    return json.dumps(value, allow_nan=False)
