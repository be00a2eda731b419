"""Checkpoint files: reading without unpickling, and atomic writing."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flmoe_kernels.core.figures import printable
from flmoe_kernels.core.files import ZIP_HEAD, checked_head, unwritable_reason, write_whole

from .layout import LayoutError, Place, find_layer, listed

MODEL_KEY = "ensemble_model"
CONFIG_KEY = "flmoe_config"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
PICKLE_HEAD = b"\x80"  # of the older format of torch.save
NOT_TORCH = "not a PyTorch checkpoint, or truncated"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line with the file and the problem."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(printable(" ".join(f"{os.fspath(path)}: {problem}".split())))


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """The layer in a checkpoint file."""

    path: Path
    state_dict: dict[str, Tensor]  # of the layer, with the layer's own keys
    config: dict[str, Any]  # the settings that `write` added; empty if there are none
    content: dict[Any, Any]  # without the settings; {"ensemble_model": state_dict} for a single one
    place: Place  # of the layer in the content

    def error(self, problem: str) -> CheckpointError:
        """An error that names the file and, if it has a name in the file, the layer."""
        return CheckpointError(self.path, f"{self.place.name}: {problem}".removeprefix(": "))


def read(path: Path, layer: str | None = None) -> CheckpointFile:
    """Read a file of torch.save or a .safetensors file; only tensors are unpickled. layer: see `find_layer`."""
    try:
        head = checked_head(path)
    except OSError as error:
        raise CheckpointError(path, str(error).removeprefix(f"{path}: ")) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(path, NOT_TORCH) from error
    is_safe = path.suffix == ".safetensors"
    content, config = _read_safetensors(path) if is_safe else _read_torch(path, head)
    try:
        place = find_layer(content, layer)
        state = place.state_dict()
    except LayoutError as error:
        raise CheckpointError(path, str(error)) from error
    if place.mapping is content:
        content = {MODEL_KEY: content}
    return CheckpointFile(path, state, config, content, place)


def _read_torch(path: Path, head: bytes) -> tuple[Any, dict[str, Any]]:
    if not head.startswith((ZIP_HEAD, PICKLE_HEAD)):
        raise CheckpointError(path, NOT_TORCH)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch rejects every global that tensors do not need, and names it.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                path,
                f"contains {refused[1]}, which is not plain data; not loaded, because it could run code; "
                "save the model's state_dict alone",
            ) from error
        raise CheckpointError(path, NOT_TORCH) from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # For damaged files the readers of archives and pickles raise many kinds of errors.
        raise CheckpointError(path, NOT_TORCH) from error
    config = content.pop(CONFIG_KEY, None) if isinstance(content, dict) else None
    return content, config if isinstance(config, dict) else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(path, "not a .safetensors file, or truncated") from error
    return state, config if isinstance(config, dict) else {}


def target_of(file: CheckpointFile, out: str | os.PathLike[str] | None) -> Path:
    """Return the path to write to; CheckpointError if it cannot be written."""
    known = file.path.suffix in SUFFIXES
    name = (file.path.stem if known else file.path.name) + ".flmoe.pt"
    target = file.path.with_name(name) if out is None else Path(out)
    if reason := unwritable_reason(target):
        raise CheckpointError(target, reason)
    if target.exists() and target.samefile(file.path):
        raise CheckpointError(target, "is the checkpoint itself, expected another file")
    if target.suffix == ".safetensors" and (others := _no_tensors(file)):
        raise CheckpointError(
            target,
            f"the checkpoint also holds {listed(others)}, which a .safetensors file cannot hold; write a .pt file",
        )
    return target


def _no_tensors(file: CheckpointFile) -> list[str]:
    """Names of the entries that a .safetensors file, a single dict of tensors, cannot hold."""
    tensors = file.place.mapping
    names = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    names += [key for key, value in file.content.items() if value is not tensors]
    return sorted(map(repr, names))


def write(
    target: Path, file: CheckpointFile, state: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Write the file's contents, changed in place, with this state dict and the settings, atomically."""
    file.place.replace({key: value.detach().clone().contiguous() for key, value in state.items()})

    def save(stream: BinaryIO) -> None:
        if target.suffix == ".safetensors":
            from safetensors.torch import save

            # Tensors of a .safetensors file share no memory.
            tensors = {key: value.clone() for key, value in file.place.mapping.items()}
            stream.write(save(tensors, metadata={CONFIG_KEY: json.dumps(config)}))
        else:
            torch.save({**file.content, CONFIG_KEY: config}, stream)

    try:
        write_whole(target, save)
    except ModuleNotFoundError as error:
        raise CheckpointError(target, "needs a package: pip install safetensors") from error
    except OSError as error:
        raise CheckpointError(target, str(error).removeprefix(f"{target}: ")) from error
    except (RecursionError, RuntimeError, ValueError) as error:  # entries beside the layer
        raise CheckpointError(target, f"cannot be written: {error}") from error
