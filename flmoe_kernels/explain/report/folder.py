"""Result files of a run: written after all are computed, index.html last; other files are not touched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from flmoe_kernels.core.files import Content, write_whole

CHECKPOINTS, PAGE = "checkpoints", "index.html"
# Every name that a run writes; no other file is replaced or removed.
_RESULT = re.compile(
    r"index\.html|explanation\.json|attribution\.npz|expert_weights\.png"
    r"|(?:faithfulness|pair_masking_(?:SII|RG))\.(?:npz|png)"
    r"|sample_\d{5,}_(?:SII|RG)(?:\.npz|_network\.png|_\d+_\d+\.png)"
)


class FolderError(ValueError):
    """The folder has results of another run; the message names one of them."""


def require_free(path: Path, force: bool) -> None:
    """Check that the folder has no results, or that `force` allows to replace them; changes nothing.

    Raises FolderError: the folder has results, and no `force`; OSError: not a folder, or it cannot be read.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder, got a file")
    if not force and (results := _results(path)):
        raise FolderError(
            f"{path}: has results ({results[0].name}); use another folder, or replace them with --force"
        )


def claim(path: Path, force: bool) -> Path:
    """Remove earlier results, with `force` also saved progress; return the folder for the estimates' progress."""
    path.mkdir(parents=True, exist_ok=True)
    _remove(_results(path))
    if force:
        clear_progress(path)
    return path / CHECKPOINTS


def publish(path: Path, files: Mapping[str, Content]) -> None:
    """Write the results, the page last. If this fails or is interrupted, those written are removed."""
    try:
        for name in sorted(files, key=lambda name: name == PAGE):
            write_whole(path / name, files[name])
    except BaseException:
        _remove(path / name for name in files)
        raise
    clear_progress(path)


def clear_progress(path: Path) -> None:
    folder = path / CHECKPOINTS
    _remove(folder.glob("sample_*.npz"))
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _results(path: Path) -> list[Path]:
    """Files of results in the folder, the page first."""
    found = [file for file in path.glob("*") if _RESULT.fullmatch(file.name)]
    return sorted(found, key=lambda file: (file.name != PAGE, file))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
