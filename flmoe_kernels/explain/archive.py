"""Results as files: one .npz of arrays and a JSON header, never unpickled."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flmoe_kernels.core.figures import printable
from flmoe_kernels.core.files import write_whole

if TYPE_CHECKING:
    from typing_extensions import Self

Arrays = dict[str, NDArray[Any]]

FORMAT = 1
_HEADER = "header"


def encode(kind: str, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of a file; the header must be JSON serializable."""
    whole = {"kind": kind, "format": FORMAT, **header}
    text = json.dumps(whole, allow_nan=False).encode()
    buffer = io.BytesIO()
    parts: dict[str, Any] = {_HEADER: np.frombuffer(text, dtype=np.uint8), **arrays}
    np.savez_compressed(buffer, **parts)
    return buffer.getvalue()


def arrays_of(file: BinaryIO | Path) -> Arrays:
    """The arrays of an .npz file, read without unpickling; ValueError names an array that cannot be read."""
    arrays, name = {}, "the file"
    try:
        with np.load(file, allow_pickle=False) as parts:
            for name in parts.files:
                arrays[name] = parts[name]
                if not isinstance(arrays[name], np.ndarray):
                    raise TypeError("not an array")
    except Exception as error:
        # numpy and zipfile raise many kinds for files that are truncated, altered, encrypted or too large.
        raise ValueError(
            f"{printable(name)}: expected a plain array that fits in memory, got a damaged or encrypted one, or "
            "Python objects, which are not unpickled"
        ) from error
    return arrays


def decode(content: bytes, kind: str, name: str) -> tuple[dict[str, Any], Arrays]:
    """Return the header and the arrays of a file; ValueError if it is damaged or has another kind or format."""
    problem = f"{name}: not a file of {kind}, or a damaged one"
    try:
        arrays = arrays_of(io.BytesIO(content))
        header = json.loads(arrays.pop(_HEADER).tobytes())
    except (ValueError, KeyError) as error:
        raise ValueError(problem) from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise ValueError(problem)
    # Files of version 0.1 named the number "version".
    number = header.get("format", header.get("version"))
    if number != FORMAT:
        raise ValueError(f"{name}: expected format {FORMAT}, got {number}")
    return header, arrays


class Saved:
    """Base of the result dataclasses, which can be saved and loaded.

    Every field in `_ARRAYS` holds an array, and every field in `_LISTS` a tuple with one array per modality. All
    other fields are written to the header as JSON. Arrays are loaded as CPU tensors, or as numpy arrays if
    `_NUMPY` is set.
    """

    _ARRAYS: ClassVar[tuple[str, ...]] = ()
    _LISTS: ClassVar[tuple[str, ...]] = ()
    _OPTIONAL: ClassVar[tuple[str, ...]] = ()  # arrays that may be None
    _NUMPY: ClassVar[bool] = False

    def save(self, path: str | Path) -> None:
        """Write one .npz file atomically."""
        write_whole(Path(path), self.encoded())

    def encoded(self) -> bytes:
        """The content of the file that `save` writes."""
        parts = {name: getattr(self, name) for name in self._ARRAYS}
        for name in self._LISTS:
            parts |= {f"{name}_{m}": x for m, x in enumerate(getattr(self, name))}
        arrays = {
            name: x.cpu().numpy() if isinstance(x, Tensor) else x
            for name, x in parts.items()
            if x is not None
        }
        return encode(self._kind(), self._header(), arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is damaged or of another kind.
        """
        header, arrays = decode(Path(path).read_bytes(), cls._kind(), str(path))
        # The arrays are counted, because the header of a forged file may hold any number.
        modalities = range(
            sum(bool(cls._LISTS) and x.startswith(f"{cls._LISTS[0]}_") for x in arrays)
        )
        lists = {name: [f"{name}_{m}" for m in modalities] for name in cls._LISTS}
        whole = {*cls._ARRAYS, *(name for names in lists.values() for name in names)}
        # Files of earlier versions have no fields that were added later, with a default.
        fields = [name for name in cls._header_fields() if name in header]
        required = {*cls._header_fields(required=True)}
        if not whole - {*cls._OPTIONAL} <= {*arrays} <= whole or not required <= {*header}:
            raise ValueError(f"{path}: expected the fields of {cls._kind()}, got different ones")
        cls._check(str(path), arrays)
        parts: dict[str, Any] = dict(arrays)
        if not cls._NUMPY:
            parts = {name: torch.from_numpy(x) for name, x in arrays.items()}
        values = {name: parts.get(name) for name in cls._ARRAYS}
        values |= {name: tuple(parts[x] for x in names) for name, names in lists.items()}
        for name in fields:
            # JSON has no tuples.
            values[name] = tuple(header[name]) if isinstance(header[name], list) else header[name]
        return cls(**values)

    @classmethod
    def _check(cls, name: str, arrays: Arrays) -> None:
        """Raise ValueError, with the file's name, if the arrays are inconsistent."""

    @classmethod
    def _kind(cls) -> str:
        return f"flmoe_kernels.explain.{cls.__name__}"

    @classmethod
    def _header_fields(cls, required: bool = False) -> list[str]:
        every: Any = cls
        names = [
            field.name
            for field in dataclasses.fields(every)
            if not required or (field.default is field.default_factory is dataclasses.MISSING)
        ]
        return [name for name in names if name not in (*cls._ARRAYS, *cls._LISTS)]

    def _header(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._header_fields()}
