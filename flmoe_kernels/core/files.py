"""Atomic writing of files, and checks before reading."""

from __future__ import annotations

import os
import stat
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from .memory import available_bytes

ZIP_HEAD = b"PK\x03\x04"
HEAD_BYTES = 16
Content = bytes | str | Callable[[BinaryIO], object]


def write_whole(target: Path, content: Content, *, make_folder: bool = False) -> None:
    """Write a file atomically: readers see the old content or the new content, never a part of it.

    A temporary file beside the target replaces it at the end. If the write fails or is interrupted (Ctrl-C), the
    target is unchanged and the temporary file is removed. The file's permissions follow the umask. If the target
    is a link, the file that it points to is replaced. A pipe or device, such as /dev/stdout, is written directly.

    Args:
        target: the file.
        content: bytes; text, which is written as UTF-8; or a function that writes to a given binary stream.
        make_folder: create missing folders.

    Raises:
        OSError: the file cannot be written; the message is one line with the target and the reason.
    """
    try:
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        if is_replaced(target):
            _replace(target.resolve(), content)
        else:
            with target.open("wb") as stream:
                _write(stream, content)
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise _named(cause, f"{target}: cannot be written") from error


def checked_head(path: Path) -> bytes:
    """Return the first bytes of a file, after a check that it can be read whole.

    A pipe or a device is not opened, because opening or reading it may never end. The parts of a zip archive
    are counted unpacked.

    Raises:
        OSError: not a regular file, empty, not readable or larger than the available memory; the message is
            one line with the path and the reason.
        zipfile.BadZipFile: a zip archive without a readable list of its parts.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{path}: is a folder, expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path}: is a device, pipe or socket, expected a regular file")
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as error:
        if error.errno is None:
            raise
        raise _named(error, f"{path}: cannot be read") from error
    if not head:
        raise OSError(f"{path}: is empty")
    size, most = status.st_size, available_bytes(torch.device("cpu"))
    if head.startswith(ZIP_HEAD):
        size = max(size, _unpacked_bytes(path))
    if size > most:
        raise OSError(f"{path}: expected at most {most} bytes, the available memory, got {size}")
    return head


def _unpacked_bytes(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(part.file_size for part in archive.infolist())
    except Exception as error:
        # For damaged archives zipfile raises many kinds of errors.
        raise zipfile.BadZipFile(f"{path}: not a zip archive, or truncated") from error


def _named(cause: OSError, problem: str) -> OSError:
    """An error of the same class, PermissionError for example, whose message is one line."""
    reason = " ".join((cause.strerror or str(cause)).split())
    # With a single argument, str() is the message alone.
    named = type(OSError(cause.errno or 0, reason))(f"{problem}: {reason}")
    named.errno = cause.errno
    return named


def _replace(target: Path, content: Content) -> None:
    # Not the process id: two containers may share a folder and have the same id.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp{target.suffix}")
    try:
        with temporary.open("wb") as stream:
            _write(stream, content)
            stream.flush()
            os.fsync(stream.fileno())  # the content must be on disk before the rename
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write(stream: BinaryIO, content: Content) -> None:
    if isinstance(content, bytes):
        stream.write(content)
    elif isinstance(content, str):
        stream.write(content.encode())
    else:
        content(stream)


def _cause(error: BaseException | None) -> OSError | None:
    """The system's error behind an error. torch.save, for example, reports a full disk as "unexpected pos"."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def is_replaced(target: Path) -> bool:
    """Whether `write_whole` replaces the target: a regular or missing file, but not the path of an open file."""
    folder = target.parent.resolve()
    opened = folder == Path("/dev") or folder.parts[1:2] == ("proc",)  # /dev/stdout, /dev/fd/1
    return not opened and (target.is_file() or not target.exists())


def unwritable_reason(target: Path) -> str:
    """The reason why `write_whole` cannot write the target, as far as permissions tell, or ""."""
    try:
        if target.is_dir():
            return "is a folder, expected a file to write"
        if not is_replaced(target):
            return "" if os.access(target, os.W_OK) else "cannot be written"
        folder = target.resolve().parent
        if not folder.is_dir():
            return "cannot be written: no such folder"
        return "" if os.access(folder, os.W_OK) else "cannot be written: the folder is not writable"
    except (OSError, RuntimeError) as error:  # RuntimeError: pathlib's error for a loop of links
        return f"cannot be written: {getattr(error, 'strerror', None) or error}"
