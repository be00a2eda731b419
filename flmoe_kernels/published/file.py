"""Checkpoint files: reading without unpickling, and atomic writing."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flmoe_kernels.core.files import unwritable_reason, write_whole

MODEL_KEY = "ensemble_model"
CONFIG_KEY = "flmoe_config"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
MAX_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line with the file and the problem."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(" ".join(f"{os.fspath(path)}: {problem}".split()))


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """The contents of a checkpoint file.

    Attributes:
        path: of the file.
        state_dict: of the layer, without DataParallel's prefix "module.".
        config: the settings that `write` added; empty if there are none.
        others: all other entries of the file, kept for writing.
    """

    path: Path
    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    others: dict[str, Any]


def read(path: Path) -> CheckpointFile:
    """Read a file of torch.save or a .safetensors file; only tensors are unpickled.

    Raises:
        CheckpointError: the file does not exist, is damaged or does not hold a state_dict.
    """
    if path.is_dir():
        raise CheckpointError(path, "is a folder, expected a checkpoint file")
    if not path.exists():
        raise CheckpointError(path, "no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(path, f"holds a {type(content).__name__}, expected a state_dict")
    others: dict[str, Any] = dict(content) if MODEL_KEY in content else {}
    config = others.pop(CONFIG_KEY, None)
    state: Any = others.pop(MODEL_KEY, content)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(path, f"holds no state_dict, or an empty one, under {MODEL_KEY!r}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                path,
                f"expected a state_dict or {{{MODEL_KEY!r}: state_dict}}, but {key!r} holds a "
                f"value of type {type(value).__name__}",
            )
    config = dict(config) if isinstance(config, Mapping) else {}
    return CheckpointFile(path, _unprefixed(state), config, others)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch rejects every global that tensors do not need, and names it.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                path,
                f"holds more than tensors ({refused[1]}); not loaded, because it could run code",
            ) from error
        raise CheckpointError(path, "not a PyTorch checkpoint, or truncated") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # For damaged files the readers of archives and pickles raise many kinds of errors.
        raise CheckpointError(path, "not a PyTorch checkpoint, or truncated") from error


def _read_safetensors(path: Path) -> CheckpointFile:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(path, "needs a package: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config = json.loads((file.metadata() or {}).get(CONFIG_KEY, "{}"))
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(path, "not a .safetensors file, or truncated") from error
    return CheckpointFile(path, _unprefixed(state), config if isinstance(config, dict) else {}, {})


def _unprefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def listed(items: Iterable[str]) -> str:
    """Format the first items in one line, and the number of further items."""
    names = list(items)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def target_of(file: CheckpointFile, out: str | os.PathLike[str] | None) -> Path:
    """Return the path to write to.

    Raises:
        CheckpointError: the path cannot be written; this is checked before any other work.
    """
    known = file.path.suffix in SUFFIXES
    name = (file.path.stem if known else file.path.name) + ".flmoe.pt"
    target = file.path.with_name(name) if out is None else Path(out)
    if reason := unwritable_reason(target):
        raise CheckpointError(target, reason)
    if target.exists() and target.samefile(file.path):
        raise CheckpointError(target, "is the checkpoint itself, expected another file")
    if target.suffix == ".safetensors" and file.others:
        raise CheckpointError(
            target,
            f"the checkpoint also holds {listed(sorted(map(repr, file.others)))}, which a "
            ".safetensors file cannot hold; write a .pt file",
        )
    return target


def write(target: Path, file: CheckpointFile, config: dict[str, Any]) -> None:
    """Write the state dict and the settings atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    state = {key: value.detach().clone().contiguous() for key, value in file.state_dict.items()}

    def save(stream: BinaryIO) -> None:
        if target.suffix == ".safetensors":
            from safetensors.torch import save

            stream.write(save(state, metadata={CONFIG_KEY: json.dumps(config)}))
        else:
            torch.save({**file.others, MODEL_KEY: state, CONFIG_KEY: config}, stream)

    try:
        write_whole(target, save)
    except ModuleNotFoundError as error:
        raise CheckpointError(target, "needs a package: pip install safetensors") from error
    except OSError as error:
        raise CheckpointError(target, str(error).removeprefix(f"{target}: ")) from error
