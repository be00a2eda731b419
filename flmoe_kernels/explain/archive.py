"""Files of arrays and a header: one .npz, the header as JSON bytes in it; nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

_HEADER = "header"
_VERSION = 1


def encode(kind: str, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The content of a file; header in JSON's types."""
    whole = {"kind": kind, "version": _VERSION, **header}
    text = json.dumps(whole, allow_nan=False).encode()
    buffer = io.BytesIO()
    parts: dict[str, Any] = {_HEADER: np.frombuffer(text, dtype=np.uint8), **arrays}
    np.savez_compressed(buffer, **parts)
    return buffer.getvalue()


def decode(content: bytes, kind: str, name: str) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of a file's content.

    Raises:
        ValueError: naming the file, where it is not whole or of another kind or version.
    """
    problem = f"{name}: not a file of {kind}, or a damaged one"
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        header = json.loads(arrays.pop(_HEADER).tobytes())
    except (ValueError, KeyError, AttributeError, TypeError, EOFError, OSError) as error:
        raise ValueError(problem) from error
    # RuntimeError: a part that says it is encrypted, or packed in a way that zipfile does not know.
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise ValueError(problem) from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise ValueError(problem)
    if header.get("version") != _VERSION:
        raise ValueError(
            f"{name}: expected version {_VERSION} of the format, got {header.get('version')}"
        )
    return header, arrays


def write_whole(target: Path, content: bytes) -> None:
    """The file appears whole or not at all, and an old one stays until the new one is there.

    Also where the machine stops, and where several processes write the same file.
    """
    # Processes of several containers on one file system may have the same number.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # else the name may be on the disk before the content
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
