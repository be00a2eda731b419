"""Checkpoints of the published layer: reading them without running anything, and converting them.

A checkpoint holds parameters, not settings: the architecture is read from its keys and shapes, and
anything that does not fit is an error that lists it. The number of heads and the temperature, and
how the gates of sparse MLPs choose, leave no trace in the parameters and must be given, unless the
file was written here and carries them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from flmoe_kernels.layers.interaction_moe.architecture import Architecture, build
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE

from .file import (
    CONFIG_KEY,
    MODEL_KEY,
    CheckpointError,
    CheckpointFile,
    listed,
    read,
    target_of,
    write,
)
from .infer_sparse import in_one_layout, in_words, infer_sparse
from .swap import SwapReport, swap

__all__ = [
    "CONFIG_KEY",
    "MODEL_KEY",
    "Architecture",
    "CheckpointError",
    "Conversion",
    "build",
    "load_checkpoint",
    "load_layer",
    "swap_checkpoint",
]

DEFAULT_HEADS = 4
DEFAULT_TEMPERATURE = 1.0

EXPERT = r"interaction_experts\.\d+\.fusion_model\."
HEAD = EXPERT + r"network\.(\d+)\.fc\.weight"


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
            f"parameters do not tell{self._gate_in_words()}.\nWrote {self.out}."
        )

    def _gate_in_words(self) -> str:
        sparse = self.architecture.sparse
        if sparse is None:
            return ""
        noisy = "" if sparse.gate == "NoisyGate" else f"the gate, {sparse.gate}, and "
        return f"; nor do they tell {noisy}that a token takes {sparse.top_k} of its experts"


def load_checkpoint(
    path: str | os.PathLike[str], *, gate: str | None = None, top_k: int | None = None
) -> tuple[dict[str, Tensor], Architecture]:
    """The state_dict of an interaction layer and the architecture that its keys and shapes tell.

    Args:
        path: a file of torch.save, either {"ensemble_model": state_dict, ...} or a bare
            state_dict, or a .safetensors file. Keys may carry DataParallel's "module." prefix.
            Sparse MLPs in either layout of FastMoE are returned in the one of the published layer.
        gate: of sparse MLPs: "NaiveGate", "GShardGate", "SwitchGate" or "NoisyGate"; default what
            the file says if it was converted here, else NoisyGate where its parameters show, else
            GShardGate.
        top_k: experts of a token; default likewise, else 2, for SwitchGate 1.

    Raises:
        CheckpointError: no readable checkpoint, one that holds more than tensors (it is not
            unpickled), or keys, shapes and settings that do not fit, which are listed.
    """
    file, architecture = _infer(read(Path(path)), gate, top_k)
    return file.state_dict, architecture


def load_layer(
    path: str | os.PathLike[str],
    num_heads: int | None = None,
    temperature: float | None = None,
    dropout: float = 0.5,
    *,
    gate: str | None = None,
    top_k: int | None = None,
) -> ReferenceInteractionMoE:
    """The reference layer with the parameters of a checkpoint, in eval mode; `swap` makes it fast.

    Args:
        path: see `load_checkpoint`.
        num_heads: attention heads; default what the file says if it was converted here, else 4.
        temperature: of the softmax over experts; default likewise, else 1.0.
        dropout: rate of the dropouts inside the fusion models, for training on.
        gate, top_k: see `load_checkpoint`. A layer with sparse MLPs also returns gate losses.

    Raises:
        CheckpointError: as load_checkpoint, or settings that do not fit the architecture.
    """
    file, architecture = _infer(read(Path(path)), gate, top_k)
    return _layer(file, architecture, *_settings(file, num_heads, temperature), dropout)


def swap_checkpoint(
    path: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    temperature: float | None = None,
    gate: str | None = None,
    top_k: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Check that the fast layer computes what a checkpoint's does; write it with its settings.

    The written file holds {"ensemble_model": state_dict, "flmoe_config": settings} and what else
    the checkpoint held; it loads in the published layer as well. It appears whole or not at all.

    Args:
        path: see `load_checkpoint`.
        num_heads: see `load_layer`.
        temperature: see `load_layer`.
        gate, top_k: see `load_checkpoint`.
        out: file to write, .safetensors or torch.save's format; default beside the checkpoint, with
            the suffix .flmoe.pt.

    Raises:
        CheckpointError: as load_layer, the two layers disagree, or the file cannot be written.
    """
    file, architecture = _infer(read(Path(path)), gate, top_k)
    heads, scale = _settings(file, num_heads, temperature)
    target = target_of(file, out)
    layer = _layer(file, architecture, heads, scale)
    report = swap(layer)
    if report.left:
        raise CheckpointError(path, f"not converted: {report.left[0].reason}")
    config = {**dataclasses.asdict(architecture), "num_heads": heads, "temperature": scale}
    write(target, file, config)
    return Conversion(file.path, target, architecture, heads, scale, report)


def _infer(
    file: CheckpointFile, gate: str | None, top_k: int | None
) -> tuple[CheckpointFile, Architecture]:
    """The architecture, and the file with its sparse MLPs, if any, in the published layout."""
    state, path = file.state_dict, file.path
    experts = 1 + _last(file, r"interaction_experts\.(\d+)\..*", "of the experts")
    if experts < 4:
        raise CheckpointError(path, f"expected 4 experts (two modalities) or more, got {experts}")
    num_layers = _last(file, HEAD, "of the experts' heads")
    reweight = _last(file, r"reweight\.mlp\.network\.(\d+)\.weight", "of the reweighting MLP")
    if max(experts, num_layers, reweight) > len(state):
        raise CheckpointError(path, "numbers in its keys exceed the number of its keys")
    positions = [key for key in state if re.fullmatch(EXPERT + "pos_embed", key)]
    modalities = experts - 2
    dim = _size(file, EXPERT + r"network\.\d+\.norm1\.weight", 0)
    architecture = Architecture(
        num_modalities=modalities,
        hidden_dim=dim,
        num_classes=_size(file, HEAD, 0),
        num_layers=num_layers,
        compat="i2moe" if positions else "fl_i2moe",
        num_patches=_size(file, EXPERT + "pos_embed", 1) // modalities if positions else None,
        reweight_hidden=_size(file, r"reweight\.mlp\.network\.0\.weight", 0) if reweight else None,
        reweight_layers=reweight // 3 + 1,
        sparse=infer_sparse(file, dim, gate, top_k),
    )
    file = in_one_layout(file, architecture)
    _check_strictly(file, architecture)
    return file, architecture


def _last(file: CheckpointFile, pattern: str, whose: str) -> int:
    matches = [re.fullmatch(pattern, key) for key in file.state_dict]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers:
        keys = listed(repr(key) for key in file.state_dict)
        raise CheckpointError(
            file.path,
            f"not an interaction layer: no keys {whose}; it has {keys}",
        )
    return max(numbers)


def _size(file: CheckpointFile, pattern: str, axis: int) -> int:
    for key, value in file.state_dict.items():
        if re.fullmatch(pattern, key) and value.dim() > axis and value.shape[axis] > 0:
            return int(value.shape[axis])
    raise CheckpointError(file.path, f"no usable tensor at any key {pattern}".replace("\\", ""))


def _check_strictly(file: CheckpointFile, architecture: Architecture) -> None:
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
            + "; ".join(f"{what}: {listed(keys)}" for what, keys in problems.items() if keys),
        )
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise CheckpointError(
            file.path, f"expected one floating dtype, got {listed(sorted(map(str, dtypes)))}"
        )


def _in_words(architecture: Architecture) -> str:
    return (
        f"{architecture.compat}, {architecture.num_modalities} modalities, "
        f"width {architecture.hidden_dim}, {architecture.num_classes} classes, "
        f"{architecture.num_layers} fusion layers{in_words(architecture.sparse)}"
    )


def _settings(
    file: CheckpointFile, num_heads: int | None, temperature: float | None
) -> tuple[int, float]:
    heads, scale = file.config.get("num_heads"), file.config.get("temperature")
    if num_heads is None:
        num_heads = heads if isinstance(heads, int) else DEFAULT_HEADS
    if temperature is None:
        temperature = float(scale) if isinstance(scale, int | float) else DEFAULT_TEMPERATURE
    return num_heads, temperature


def _layer(
    file: CheckpointFile,
    architecture: Architecture,
    num_heads: int,
    temperature: float,
    dropout: float = 0.5,
) -> ReferenceInteractionMoE:
    try:
        sparse = architecture.sparse is not None
        layer = build(architecture, num_heads, temperature, dropout, fusion_sparse=sparse)
    except ValueError as error:
        raise CheckpointError(file.path, str(error)) from error
    layer.to(next(iter(file.state_dict.values())).dtype).load_state_dict(file.state_dict)
    return layer.eval()
