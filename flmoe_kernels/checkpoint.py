"""Checkpoints of the published layer: reading them without running anything, and converting them.

A checkpoint holds parameters, not settings: the architecture is read from its keys and shapes, and
anything that does not fit is an error that lists it. The number of heads and the temperature leave
no trace in the parameters and must be given, unless the file was written here and carries them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .interaction_moe.architecture import Architecture, build
from .interaction_moe.reference import ReferenceInteractionMoE
from .swap import SwapReport, swap

__all__ = [
    "Architecture",
    "CheckpointError",
    "Conversion",
    "build",
    "load_checkpoint",
    "load_layer",
    "swap_checkpoint",
]

MODEL_KEY = "ensemble_model"
CONFIG_KEY = "flmoe_config"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
DEFAULT_HEADS = 4
DEFAULT_TEMPERATURE = 1.0
LISTED = 20

EXPERT = r"interaction_experts\.\d+\.fusion_model\."
HEAD = EXPERT + r"network\.(\d+)\.fc\.weight"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that names the file and what is wrong with it."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(" ".join(f"{os.fspath(path)}: {problem}".split()))


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    others: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `swap_checkpoint` did: where it wrote, with what settings, and the check's report."""

    source: Path
    out: Path
    architecture: Architecture
    num_heads: int
    temperature: float
    report: SwapReport

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": str(self.source),
            "out": str(self.out),
            "architecture": dataclasses.asdict(self.architecture),
            "num_heads": self.num_heads,
            "temperature": self.temperature,
            **self.report.as_dict(),
        }

    def summary(self) -> str:
        """What was read, with what settings it was run, and what was written."""
        return (
            f"Read {self.source}: {_in_words(self.architecture)}.\n"
            f"Run with {self.num_heads} heads and temperature {self.temperature:g}, which its "
            f"parameters do not tell.\nWrote {self.out}."
        )


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Architecture]:
    """The state_dict of an interaction layer and the architecture that its keys and shapes tell.

    Args:
        path: a file of torch.save, either {"ensemble_model": state_dict, ...} or a bare
            state_dict, or a .safetensors file. Keys may carry DataParallel's "module." prefix.

    Raises:
        CheckpointError: no readable checkpoint, one that holds more than tensors (it is not
            unpickled), sparse MLPs, or keys and shapes that do not fit, which are listed.
    """
    file = _read(Path(path))
    return file.state_dict, _infer(file)


def load_layer(
    path: str | os.PathLike[str],
    num_heads: int | None = None,
    temperature: float | None = None,
    dropout: float = 0.5,
) -> ReferenceInteractionMoE:
    """The reference layer with the parameters of a checkpoint, in eval mode; `swap` makes it fast.

    Args:
        path: see `load_checkpoint`.
        num_heads: attention heads; default what the file says if it was converted here, else 4.
        temperature: of the softmax over experts; default likewise, else 1.0.
        dropout: rate of the dropouts inside the fusion models, for training on.

    Raises:
        CheckpointError: as load_checkpoint, or settings that do not fit the architecture.
    """
    file = _read(Path(path))
    return _layer(file, _infer(file), *_settings(file, num_heads, temperature), dropout)


def swap_checkpoint(
    path: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    temperature: float | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Check that the fast layer computes what a checkpoint's does; write it with its settings.

    The written file holds {"ensemble_model": state_dict, "flmoe_config": settings} and what else
    the checkpoint held; it loads in the published layer as well. It appears whole or not at all.

    Args:
        path: see `load_checkpoint`.
        num_heads: see `load_layer`.
        temperature: see `load_layer`.
        out: file to write, .safetensors or torch.save's format; default beside the checkpoint, with
            the suffix .flmoe.pt.

    Raises:
        CheckpointError: as load_layer, the two layers disagree, or the file cannot be written.
    """
    file = _read(Path(path))
    architecture = _infer(file)
    heads, scale = _settings(file, num_heads, temperature)
    target = _target(file, out)
    layer = _layer(file, architecture, heads, scale)
    report = swap(layer)
    if report.left:
        raise CheckpointError(path, f"not converted: {report.left[0].reason}")
    config = {**dataclasses.asdict(architecture), "num_heads": heads, "temperature": scale}
    _write(target, file, config)
    return Conversion(file.path, target, architecture, heads, scale, report)


def _read(path: Path) -> _File:
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
        raise CheckpointError(path, f"holds an empty or no state_dict under {MODEL_KEY!r}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                path,
                f"expected a state_dict or {{{MODEL_KEY!r}: state_dict}}, but {key!r} holds a "
                f"value of type {type(value).__name__}",
            )
    config = dict(config) if isinstance(config, Mapping) else {}
    return _File(path, _unprefixed(state), config, others)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch refuses every global that is not needed for tensors, and names it so.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                path,
                f"holds more than tensors ({refused[1]}); not loaded, since that could run code",
            ) from error
        raise CheckpointError(path, "not a PyTorch checkpoint, or a truncated one") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # The readers of archive and pickle raise many kinds of error on damaged files.
        raise CheckpointError(path, "not a PyTorch checkpoint, or a truncated one") from error


def _read_safetensors(path: Path) -> _File:
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
        raise CheckpointError(path, "not a .safetensors file, or a truncated one") from error
    return _File(path, _unprefixed(state), config if isinstance(config, dict) else {}, {})


def _unprefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _infer(file: _File) -> Architecture:
    state, path = file.state_dict, file.path
    sparse = [key for key in state if re.search(r"\.mlp\.(experts|gate|all_gates)\b", key)]
    if sparse:
        raise CheckpointError(
            path, f"holds sparse MLPs ({sparse[0]}), which are not supported in this version"
        )
    experts = 1 + _last(file, r"interaction_experts\.(\d+)\..*", "of the experts")
    if experts < 4:
        raise CheckpointError(path, f"expected 4 experts (two modalities) or more, got {experts}")
    num_layers = _last(file, HEAD, "of the experts' heads")
    reweight = _last(file, r"reweight\.mlp\.network\.(\d+)\.weight", "of the reweighting MLP")
    if max(experts, num_layers, reweight) > len(state):
        raise CheckpointError(path, "numbers in its keys exceed the number of its keys")
    positions = [key for key in state if re.fullmatch(EXPERT + "pos_embed", key)]
    modalities = experts - 2
    architecture = Architecture(
        num_modalities=modalities,
        hidden_dim=_size(file, EXPERT + r"network\.\d+\.norm1\.weight", 0),
        num_classes=_size(file, HEAD, 0),
        num_layers=num_layers,
        compat="i2moe" if positions else "fl_i2moe",
        num_patches=_size(file, EXPERT + "pos_embed", 1) // modalities if positions else None,
        reweight_hidden=_size(file, r"reweight\.mlp\.network\.0\.weight", 0) if reweight else None,
        reweight_layers=reweight // 3 + 1,
    )
    _check_strictly(file, architecture)
    return architecture


def _last(file: _File, pattern: str, whose: str) -> int:
    matches = [re.fullmatch(pattern, key) for key in file.state_dict]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers:
        keys = _listed(repr(key) for key in file.state_dict)
        raise CheckpointError(
            file.path,
            f"not an interaction layer: no keys {whose}; it has {keys}",
        )
    return max(numbers)


def _size(file: _File, pattern: str, axis: int) -> int:
    for key, value in file.state_dict.items():
        if re.fullmatch(pattern, key) and value.dim() > axis and value.shape[axis] > 0:
            return int(value.shape[axis])
    raise CheckpointError(file.path, f"no usable tensor at any key {pattern}".replace("\\", ""))


def _check_strictly(file: _File, architecture: Architecture) -> None:
    expected, state = architecture.parameter_shapes(), file.state_dict
    problems = {
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} is {tuple(state[key].shape)}, expected {shape}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != shape
        ],
    }
    if any(problems.values()):
        raise CheckpointError(
            file.path,
            f"keys do not fit the architecture that they tell ({_in_words(architecture)}): "
            + "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys),
        )
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise CheckpointError(
            file.path, f"expected one floating dtype, got {_listed(sorted(map(str, dtypes)))}"
        )


def _listed(items: Iterable[str]) -> str:
    every = list(items)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(every[:LISTED]) + more


def _in_words(architecture: Architecture) -> str:
    return (
        f"{architecture.compat}, {architecture.num_modalities} modalities, "
        f"width {architecture.hidden_dim}, {architecture.num_classes} classes, "
        f"{architecture.num_layers} fusion layers"
    )


def _settings(file: _File, num_heads: int | None, temperature: float | None) -> tuple[int, float]:
    heads, scale = file.config.get("num_heads"), file.config.get("temperature")
    if num_heads is None:
        num_heads = heads if isinstance(heads, int) else DEFAULT_HEADS
    if temperature is None:
        temperature = float(scale) if isinstance(scale, int | float) else DEFAULT_TEMPERATURE
    return num_heads, temperature


def _layer(
    file: _File,
    architecture: Architecture,
    num_heads: int,
    temperature: float,
    dropout: float = 0.5,
) -> ReferenceInteractionMoE:
    try:
        layer = build(architecture, num_heads, temperature, dropout)
    except ValueError as error:
        raise CheckpointError(file.path, str(error)) from error
    layer.to(next(iter(file.state_dict.values())).dtype).load_state_dict(file.state_dict)
    return layer.eval()


def _target(file: _File, out: str | os.PathLike[str] | None) -> Path:
    """Where to write, refused before any work where that cannot succeed."""
    known = file.path.suffix in SUFFIXES
    name = (file.path.stem if known else file.path.name) + ".flmoe.pt"
    target = file.path.with_name(name) if out is None else Path(out)
    if target.is_dir():
        raise CheckpointError(target, "is a folder, expected a file to write")
    if not target.parent.is_dir():
        raise CheckpointError(target, "cannot be written: no such folder")
    if target.exists() and target.samefile(file.path):
        raise CheckpointError(target, "is the checkpoint itself, which would be overwritten")
    if target.suffix == ".safetensors" and file.others:
        raise CheckpointError(
            target,
            f"the checkpoint also holds {_listed(sorted(map(repr, file.others)))}, for which a "
            ".safetensors file has no place; write a .pt file",
        )
    return target


def _write(target: Path, file: _File, config: dict[str, Any]) -> None:
    state = {key: value.detach().clone().contiguous() for key, value in file.state_dict.items()}
    write: Callable[[Path], None]
    if target.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ModuleNotFoundError as error:
            raise CheckpointError(target, "needs a package: pip install safetensors") from error

        def write(path: Path) -> None:
            save_file(state, path, metadata={CONFIG_KEY: json.dumps(config)})
    else:

        def write(path: Path) -> None:
            with path.open("wb") as stream:
                torch.save({**file.others, MODEL_KEY: state, CONFIG_KEY: config}, stream)

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(target, f"cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
