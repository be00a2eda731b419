"""The folder of one run, with a record of what the run writes, so that runs never mix."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flmoe_kernels.core.figures import printable
from flmoe_kernels.core.files import Content, write_whole

from .request import Request

RECORD, CHECKPOINTS, PAGE = "run.json", "checkpoints", "index.html"
KIND = "flmoe_kernels.explain run"
FORMAT = 1
# Every name that a run writes. A record is not trusted: no other file is removed, whatever it lists.
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
        record = self._read()
        self._require_unfinished(record)
        known = set() if record is None else {RECORD, *record["files"]}
        for name in self._present():
            if name not in known and not (record and name.startswith(f"{CHECKPOINTS}/")):
                raise FolderError(
                    f"{path}: has a file {name} that no run of this command has recorded; use another folder"
                )

    def claim(self) -> Path:
        """Make the folder this run's; return the folder of its progress, which an equal, unfinished run left.

        Raises:
            FolderError: the folder has a run of another request, and no `force`.
        """
        request = self._request
        record = {
            "kind": KIND,
            "format": FORMAT,
            "id": uuid.uuid4().hex,
            "finished": False,
            "request": request.as_dict() | {"layer": dict(request.layer)},
            "sources": {key: _source(getattr(request, key)) for key in ("checkpoint", "data")},
            "files": [],
        }
        mine = self._mine = json.loads(json.dumps(record))
        self.path.mkdir(parents=True, exist_ok=True)
        found = self._read()
        if found is not None and not self._force:
            self._require_unfinished(found)
            if differences := _differences(found, mine):
                raise FolderError(
                    f"{self.path}: has an unfinished run, {_name(found)}, which differs from this one in "
                    f"{', '.join(differences)}; {_ADVICE}"
                )
            self._clear(found)
            # With a new id, so that the other process, if it still runs, publishes nothing.
            self._write(mine)
            return self.path / CHECKPOINTS
        if found is not None:
            self._clear(found)
            self._clear_progress()
            (self.path / RECORD).unlink(missing_ok=True)
        # Created exclusively: if two runs start at the same time, only one gets the folder.
        with (self.path / RECORD).open("x", encoding="utf-8") as file:
            file.write(_text(mine))
        return self.path / CHECKPOINTS

    def publish(self, files: Mapping[str, Content]) -> None:
        """Write the results, the page last. If this fails or is interrupted, those written are removed.

        Raises:
            FolderError: another run has replaced this one, or there are other files of these names.
            OSError: a file cannot be written.
        """
        self._require_mine()
        for name in files:
            if os.path.lexists(self.path / name):
                raise FolderError(f"{self.path}: has a file {name} that this run did not write")
        self._write(self._mine | {"files": sorted(files)})
        try:
            for name in sorted(files, key=lambda name: name == PAGE):
                if name == PAGE:
                    self._require_mine()
                write_whole(self.path / name, files[name])
        except BaseException:
            for name in files:
                (self.path / name).unlink(missing_ok=True)
            raise
        self._write(self._mine | {"files": sorted(files), "finished": True})
        self._clear_progress()

    def _require_unfinished(self, record: Mapping[str, Any] | None) -> None:
        if record is not None and record["finished"] and not self._force:
            raise FolderError(
                f"{self.path}: has the results of another run, {_name(record)}; {_ADVICE}"
            )

    def _require_mine(self) -> None:
        record = self._read()
        if record is None or record["id"] != self._mine["id"]:
            raise FolderError(f"{self.path}: another run has taken the folder meanwhile")

    def _write(self, record: Mapping[str, Any]) -> None:
        write_whole(self.path / RECORD, _text(record))

    def _read(self) -> dict[str, Any] | None:
        """Return the record; None if there is none."""
        path = self.path / RECORD
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: expected a folder, got a file")
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_bytes())
            known = (record["kind"], record["format"]) == (KIND, FORMAT)
            files, sources = record["files"], record["sources"]
            known &= isinstance(record["finished"], bool) and isinstance(record["id"], str)
            known &= isinstance(record["request"], dict) and isinstance(files, list)
            known &= all(isinstance(sources[key]["name"], str) for key in ("checkpoint", "data"))
            known &= all(isinstance(name, str) and _RESULT.fullmatch(name) for name in files)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise FolderError(f"{path}: not a record of a run: a different file, or damaged")
        found: dict[str, Any] = record
        return found

    def _present(self) -> list[str]:
        """Names of results and progress in the folder, written by whomever."""
        names = [path.name for path in self.path.glob("*") if _RESULT.fullmatch(path.name)]
        return sorted(names) + [f"{CHECKPOINTS}/{path.name}" for path in self._progress()]

    def _progress(self) -> list[Path]:
        found = sorted((self.path / CHECKPOINTS).glob("*"))
        return [path for path in found if _PROGRESS.fullmatch(path.name)]

    def _clear(self, record: Mapping[str, Any]) -> None:
        """Remove the results of a run, the page first; its record stays, as unfinished."""
        if record["finished"]:
            self._write({**record, "finished": False})
        for name in sorted(record["files"], key=lambda name: name != PAGE):
            (self.path / name).unlink(missing_ok=True)

    def _clear_progress(self) -> None:
        for path in self._progress():
            path.unlink(missing_ok=True)
        folder = self.path / CHECKPOINTS
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


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


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"
