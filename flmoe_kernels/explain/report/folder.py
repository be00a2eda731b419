"""The folder of one run, with a record of its request, so that runs never mix."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flmoe_kernels.core.figures import printable
from flmoe_kernels.core.files import Content, write_whole

from .request import Request

RECORD, CHECKPOINTS, PAGE = "run.json", "checkpoints", "index.html"
KIND = "flmoe_kernels.explain run"
FORMAT = 1
SOURCES = ("checkpoint", "data")
# Every name that a run writes; no other file is replaced or removed.
_RESULT = re.compile(
    r"index\.html|explanation\.json|attribution\.npz|expert_weights\.png"
    r"|(?:faithfulness|pair_masking_(?:SII|RG))\.(?:npz|png)"
    r"|sample_\d{5,}_(?:SII|RG)(?:\.npz|_network\.png|_\d+_\d+\.png)"
)
_PROGRESS = re.compile(r"sample_\d{5,}\.npz")
_ADVICE = "use another folder, or replace that run with --force"
_BLOCK = 2**20


class FolderError(ValueError):
    """The folder belongs to another run or has other files; the message names them."""


class RunFolder:
    """Results of one run in a folder, which may also have other files, that are never replaced or removed.

    `claim` writes the record, as unfinished; `publish` writes the results, the page last, and marks the record as
    finished. Until then the folder has no page.
    """

    def __init__(self, path: Path, request: Request, force: bool) -> None:
        """Check the folder, without changing it.

        Args:
            force: replace what an earlier run wrote, finished or not.

        Raises:
            FolderError: the folder has the results of a finished run, and no `force`; or files that no run wrote,
                of the results' names.
            OSError: not a folder, or it cannot be read.
        """
        self.path, self._request, self._force = path, request, force
        self._mine: dict[str, Any] = {}
        found = self._read()
        if found is None and (others := self._results() + self._progress()):
            raise FolderError(
                f"{path}: has a file {others[0].relative_to(path)} that no run of this command has recorded; "
                "use another folder"
            )
        if found is not None and found["finished"] and not force:
            raise FolderError(f"{path}: has the results of another run, {_name(found)}; {_ADVICE}")

    def claim(self) -> Path:
        """Make the folder this run's; return the folder of its progress, which an equal, unfinished run left.

        Raises:
            FolderError: the folder has a run of another request, and no `force`.
        """
        request = self._request
        record = {
            "kind": KIND,
            "format": FORMAT,
            "finished": False,
            "request": request.as_dict() | {"layer": dict(request.layer)},
            "sources": {key: _source(getattr(request, key)) for key in SOURCES},
        }
        mine = self._mine = json.loads(json.dumps(record))
        self.path.mkdir(parents=True, exist_ok=True)
        found = self._read()
        if found is not None and not self._force and (differences := _differences(found, mine)):
            raise FolderError(
                f"{self.path}: has an unfinished run, {_name(found)}, which differs from this one in "
                f"{', '.join(differences)}; {_ADVICE}"
            )
        self._write(mine)
        _remove(self._results())
        if self._force:
            self._clear_progress()
        return self.path / CHECKPOINTS

    def publish(self, files: Mapping[str, Content]) -> None:
        """Write the results, the page last. If this fails or is interrupted, those written are removed.

        Raises:
            FolderError: a run of another request has taken the folder.
            OSError: a file cannot be written.
        """
        try:
            for name in sorted(files, key=lambda name: name == PAGE):
                if self._read() != self._mine:
                    raise FolderError(f"{self.path}: another run has taken the folder meanwhile")
                write_whole(self.path / name, files[name])
        except BaseException:
            _remove(self.path / name for name in files)
            raise
        self._write(self._mine | {"finished": True})
        self._clear_progress()

    def _write(self, record: Mapping[str, Any]) -> None:
        write_whole(self.path / RECORD, json.dumps(record, indent=1) + "\n")

    def _read(self) -> dict[str, Any] | None:
        """Return the record; None if there is none."""
        path = self.path / RECORD
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: expected a folder, got a file")
        if not path.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            known = (record["kind"], record["format"]) == (KIND, FORMAT)
            known &= isinstance(record["finished"], bool) and isinstance(record["request"], dict)
            known &= all(isinstance(record["sources"][key]["name"], str) for key in SOURCES)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise FolderError(f"{path}: not a record of a run: a different file, or damaged")
        return record

    def _results(self) -> list[Path]:
        """Files of results in the folder, the page first."""
        found = [path for path in self.path.glob("*") if _RESULT.fullmatch(path.name)]
        return sorted(found, key=lambda path: (path.name != PAGE, path))

    def _progress(self) -> list[Path]:
        found = sorted((self.path / CHECKPOINTS).glob("*"))
        return [path for path in found if _PROGRESS.fullmatch(path.name)]

    def _clear_progress(self) -> None:
        _remove(self._progress())
        folder = self.path / CHECKPOINTS
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _source(path: Path) -> dict[str, str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"name": path.name, "sha256": digest.hexdigest()}


def _name(record: Mapping[str, Any]) -> str:
    """Name a run by its files and settings."""
    sources, request = record["sources"], record["request"]
    settings = ", ".join(f"{key} {request.get(key)}" for key in ("samples", "seed", "attribution"))
    return printable(
        f"of {sources['checkpoint']['name']} on {sources['data']['name']} ({settings})"
    )


def _differences(found: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    pairs = [(key, part) for part in ("sources", "request") for key in mine[part]]
    return [key for key, part in pairs if found[part].get(key) != mine[part][key]]
