"""Conversion of the published code's state dicts and modules."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core.dtypes import FLOATS
from flmoe_kernels.core.memory import available_bytes
from flmoe_kernels.layers.interaction_moe.architecture import Architecture, LayerSpec
from flmoe_kernels.layers.interaction_moe.build import build
from flmoe_kernels.layers.interaction_moe.fusion_transformer import FusionTransformer
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.interaction_moe.regression import InteractionMoERegression
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.state import add_router_0, prepare_state_dict
from flmoe_kernels.layers.routed_mlp.structure import RoutedSpec

from .file import CheckpointError, CheckpointFile, read
from .infer import in_words, infer, infer_settings
from .layout import listed
from .places import MODULE_STATE
from .recognise import Spec


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    layer: str | None = None,
    gate: str | None = None,
    top_k: int | None = None,
) -> tuple[dict[str, Tensor], Architecture]:
    """Return the state_dict of an interaction layer and the architecture that its keys and shapes imply.

    Args:
        path: a file of torch.save or a .safetensors file, with one interaction layer anywhere in
            nested dicts, also as a part of a larger model (docs/differences.md lists layouts). Keys
            are returned without prefixes such as "module.". Sparse MLPs in either layout of FastMoE
            are returned in the published layer's layout.
        layer: the name of the layer if the file holds several; the error without it lists them.
        gate: of sparse MLPs: "NaiveGate", "GShardGate", "SwitchGate" or "NoisyGate". Default: the
            setting in a file that this package converted, else NoisyGate if the checkpoint has its
            parameters, else GShardGate.
        top_k: experts per token. Default: the setting in a converted file, else 2, for SwitchGate 1.

    Raises:
        CheckpointError: the file cannot be read, contains objects other than tensors (it is not unpickled), or
            keys, shapes and settings do not fit; the message lists them.
    """
    file = read(Path(path), layer)
    architecture = infer(file, gate, top_k)
    return convert_state(file, architecture), architecture


def load_layer(
    path: str | os.PathLike[str],
    num_heads: int | None = None,
    temperature: float | None = None,
    dropout: float = 0.5,
    *,
    layer: str | None = None,
    gate: str | None = None,
    top_k: int | None = None,
) -> ReferenceInteractionMoE:
    """Load the reference layer with a checkpoint's parameters, in eval mode; `swap` makes it fast.

    A checkpoint does not store the class or its options; it is read as an InteractionMoE with noise replacements.

    Args:
        path: see `load_checkpoint`.
        num_heads: attention heads. Default: the setting in a converted file, else 4.
        temperature: of the softmax over experts. Default: the setting in a converted file, else 1.0.
        dropout: dropout rate inside the fusion models, for further training.
        layer, gate, top_k: see `load_checkpoint`. A layer with sparse MLPs also returns gate losses.

    Raises:
        CheckpointError: as load_checkpoint, or the settings do not fit the architecture.
    """
    file = read(Path(path), layer)
    architecture = infer(file, gate, top_k)
    state = convert_state(file, architecture)
    heads, scale = infer_settings(file, num_heads, temperature)
    return make_layer(file.path, state, architecture, heads, scale, dropout)


def convert_state(file: CheckpointFile, architecture: Architecture) -> dict[str, Tensor]:
    """Return a checkpoint's state_dict, strictly checked, with sparse MLPs in the published layout."""
    state = dict(file.state_dict)
    if architecture.sparse is not None:
        state = _stack_experts(file, architecture)
    _check_strictly(file, state, architecture)
    return state


def make_layer(
    path: Path,
    state: dict[str, Tensor],
    architecture: Architecture,
    num_heads: int,
    temperature: float,
    dropout: float = 0.5,
) -> ReferenceInteractionMoE:
    """Build the reference layer from a checked state_dict, in eval mode."""
    try:
        sparse = architecture.sparse is not None
        layer = build(architecture, num_heads, temperature, dropout, fusion_sparse=sparse)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
    layer.to(next(iter(state.values())).dtype).load_state_dict(state)
    return layer.eval()


def adopt(layer: nn.Module, spec: Spec) -> nn.Module:
    """Make a fast layer from the parameters of a published layer, without its hooks and attributes."""
    if isinstance(spec, RoutedSpec):
        return RoutedMLP.adopt(layer)
    if isinstance(spec, LayerSpec):
        kind = InteractionMoERegression if spec.regression else InteractionMoE
        return kind.adopt(layer)
    return FusionTransformer.adopt(layer)


def take_over(layer: nn.Module, fast: nn.Module) -> None:
    """Move the hooks and plain attributes of the layer to the fast layer.

    The dictionaries of hooks are moved, not copied, so that handles made before the swap still remove
    their hooks. Hooks that torch bound to the layer are bound to the fast layer.
    """
    for name in MODULE_STATE:
        hooks = layer.__dict__[name]
        if name.endswith("_hook"):
            fast.__dict__[name] = hooks
        elif "_hooks" in name:
            hooks.update(fast.__dict__[name])
            fast.__dict__[name] = hooks
    bound = fast.__dict__["_load_state_dict_pre_hooks"]
    for key, hook in bound.items():
        if getattr(hook, "with_module", False):
            bound[key] = type(hook)(hook.hook, fast)
    for name, value in vars(layer).items():
        if not name.startswith("_") and not hasattr(fast, name):
            fast.__dict__[name] = value


def _stack_experts(file: CheckpointFile, architecture: Architecture) -> dict[str, Tensor]:
    """Return the state_dict with experts in one tensor and gates under both of their names."""
    with torch.device("meta"):
        skeleton = build(architecture, num_heads=1)
    state: dict[str, Any] = dict(file.state_dict)
    missing: list[str] = []
    errors: list[str] = []
    for name, part in skeleton.named_modules():
        if isinstance(part, RoutedMLP):
            prepare_state_dict(part, state, f"{name}.", {}, True, missing, [], errors)
            add_router_0(part, state, f"{name}.", {})
    errors += [f'Missing key in state_dict: "{key}".' for key in missing]
    if errors:
        raise file.error(f"sparse MLPs: {listed(errors)}")
    return {key: state[key] for key in architecture.parameter_shapes() if key in state} | state


def _check_strictly(
    file: CheckpointFile, state: dict[str, Tensor], architecture: Architecture
) -> None:
    expected = architecture.parameter_shapes()
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
        raise file.error(
            f"keys do not fit the architecture that they imply ({in_words(architecture)}): "
            + "; ".join(f"{what}: {listed(keys)}" for what, keys in problems.items() if keys),
        )
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) > 1 or not dtypes <= {*FLOATS}:
        raise file.error(f"expected one floating dtype, got {listed(sorted(map(str, dtypes)))}")
    # Tensors of a file may share memory, those of a layer do not.
    size, most = sum(value.nbytes for value in state.values()), available_bytes(torch.device("cpu"))
    if size > most:
        raise file.error(
            f"expected parameters of at most {most} bytes, the available memory, got {size}"
        )
