"""Architecture of an interaction layer, inferred from its checkpoint.

The parameters give the sizes, and whether gates are NoisyGates. They do not give the number of heads, the
temperature and, for sparse MLPs, the other kinds of gates, the number of experts per token and the capacity of an
expert. The caller must pass these, unless `swap_checkpoint` wrote the file, which then contains them.
"""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

from flmoe_kernels.layers.interaction_moe.architecture import (
    Architecture,
    SparseSpec,
    default_sparse,
)
from flmoe_kernels.layers.routed_mlp.gates import gate_class

from .file import CheckpointFile
from .layout import listed

DEFAULT_HEADS = 4
DEFAULT_TEMPERATURE = 1.0
DEFAULT_GATE = "GShardGate"
NOISY = "NoisyGate"

EXPERT = r"interaction_experts\.\d+\.fusion_model\."
HEAD = EXPERT + r"network\.(\d+)\.fc\.weight"
MLP = EXPERT + r"network\.\d+\.mlp\."


def infer(file: CheckpointFile, gate: str | None = None, top_k: int | None = None) -> Architecture:
    """Infer the architecture from the keys and shapes of a checkpoint.

    Sparse MLPs may be in either layout of FastMoE. gate and top_k: see `load_checkpoint`.
    """
    experts = _require(file, r"interaction_experts\.(\d+)\..*", "of the experts")
    if experts < 4:
        raise file.error(f"expected at least 4 experts (two modalities), got {experts}")
    num_layers = _require(file, HEAD, "of the experts' heads") - 1
    reweight = _require(file, r"reweight\.mlp\.network\.(\d+)\.weight", "of the reweighting MLP")
    learned = any(re.fullmatch(EXPERT + "pos_embed", key) for key in file.state_dict)
    _require_keys(file, experts * num_layers)
    modalities = experts - 2
    dim = _size(file, EXPERT + r"network\.\d+\.norm1\.weight", 0)
    return Architecture(
        num_modalities=modalities,
        hidden_dim=dim,
        num_classes=_size(file, HEAD, 0),
        num_layers=num_layers,
        compat="i2moe" if learned else "fl_i2moe",
        num_patches=_size(file, EXPERT + "pos_embed", 1) // modalities if learned else None,
        reweight_hidden=(
            _size(file, r"reweight\.mlp\.network\.0\.weight", 0) if reweight > 1 else None
        ),
        reweight_layers=(reweight - 1) // 3 + 1,
        sparse=_infer_sparse(file, experts * num_layers, dim, gate, top_k),
    )


def infer_settings(
    file: CheckpointFile, num_heads: int | None, temperature: float | None
) -> tuple[int, float]:
    """Return attention heads and temperature: the arguments, else the file's settings, else 4 and 1.0.

    Warns of assumed values, and of arguments that differ from the file's settings.
    """
    defaults = {"num_heads": DEFAULT_HEADS, "temperature": DEFAULT_TEMPERATURE}
    given = {"num_heads": num_heads, "temperature": temperature}
    stored: dict[str, Any] = {}
    if isinstance(heads := file.config.get("num_heads"), int):
        stored["num_heads"] = heads
    scale = file.config.get("temperature")
    if isinstance(scale, int | float) and scale <= sys.float_info.max:  # not NaN
        stored["temperature"] = float(scale)
    values: dict[str, Any] = {**defaults, **stored}
    for name, value in given.items():
        if value is None:
            continue
        if name in stored and value != stored[name]:
            warnings.warn(
                f"{file.path}: {name} is {stored[name]} in the file, used {value} as passed",
                stacklevel=3,
            )
        values[name] = value
    assumed = [name for name in values if given[name] is None and name not in stored]
    if assumed:
        warnings.warn(
            f"{file.path}: does not store {' and '.join(assumed)}; assumed "
            f"{' and '.join(str(values[name]) for name in assumed)}. With other values than in training the "
            "results are wrong",
            stacklevel=3,
        )
    return values["num_heads"], values["temperature"]


def in_words(architecture: Architecture) -> str:
    """Describe an architecture in one line."""
    sparse, words = architecture.sparse, ""
    if sparse is not None:
        words = f", sparse with {sparse.num_experts} experts, top {sparse.top_k} of a {sparse.gate}"
    return (
        f"{architecture.compat}, {architecture.num_modalities} modalities, "
        f"width {architecture.hidden_dim}, {architecture.num_classes} classes, "
        f"{architecture.num_layers} fusion layers{words}"
    )


def _infer_sparse(
    file: CheckpointFile, layers: int, dim: int, gate: str | None, top_k: int | None
) -> SparseSpec | None:
    if not any(re.match(MLP + r"(experts|gate|all_gates)\.", key) for key in file.state_dict):
        if gate is not None or top_k is not None:
            name = "top_k" if gate is None else "gate"
            raise file.error(f"{name}: expected None without sparse MLPs")
        return None
    settings: Any = file.config.get("sparse")
    settings = settings if isinstance(settings, dict) else {}
    name = _gate(file, gate, settings)
    if settings.get("gate") != name:
        settings = {}
    if top_k is None and isinstance(settings.get("top_k"), int):
        top_k = settings["top_k"]
    if top_k is None:
        top_k = 1 if name == "SwitchGate" else 2
    routers = _count(file, MLP + r"all_gates\.(\d+)\..*") or 1
    experts = _count(file, MLP + r"experts\.(\d+)\..*")
    _require_keys(file, layers * max(routers, experts))
    if not experts:
        experts = _size(file, MLP + r"experts\.htoh4\.weight", 0, dims=3)
    try:
        spec = default_sparse(experts, dim, routers, name, top_k)
    except (TypeError, ValueError) as error:
        raise file.error(f"sparse MLPs: {error}") from error
    return spec.with_settings(settings)


def _gate(file: CheckpointFile, given: str | None, settings: dict[str, Any]) -> str:
    noisy = any(re.match(MLP + r"(gate|all_gates\.\d+)\.w_gate$", key) for key in file.state_dict)
    default = NOISY if noisy else settings.get("gate", DEFAULT_GATE)
    try:
        name = gate_class(str(default if given is None else given)).__name__
    except ValueError as error:
        raise file.error(str(error)) from error
    if noisy != (name == NOISY):
        kind = "NoisyGate" if noisy else "a gate other than NoisyGate"
        raise file.error(f"gate: the parameters are of {kind}, got {name}")
    return name


def _require(file: CheckpointFile, pattern: str, whose: str) -> int:
    """Return `_count`, which must be at least 1."""
    if count := _count(file, pattern):
        return count
    keys = listed(repr(key) for key in file.state_dict)
    raise file.error(f"not an interaction layer: no keys {whose}; it has {keys}")


def _count(file: CheckpointFile, pattern: str) -> int:
    """Return the largest number at the pattern's group plus 1, or 0 if no key matches."""
    matches = [re.fullmatch(pattern, key) for key in file.state_dict]
    count = max((int(match[1]) + 1 for match in matches if match), default=0)
    if count > len(file.state_dict):
        raise file.error("a number in a key is larger than the number of keys")
    return count


def _require_keys(file: CheckpointFile, least: int) -> None:
    """Check the number of keys first, so that a small file with large numbers cannot cause much work."""
    if least > len(file.state_dict):
        raise file.error("the layer and expert numbers in its keys imply more keys than it has")


def _size(file: CheckpointFile, pattern: str, axis: int, dims: int | None = None) -> int:
    for key, value in file.state_dict.items():
        fits = value.dim() > axis if dims is None else value.dim() == dims
        if re.fullmatch(pattern, key) and fits and value.shape[axis] > 0:
            return int(value.shape[axis])
    raise file.error(f"no usable tensor at any key {pattern}".replace("\\", ""))
