"""Sparse MLPs in checkpoints: what their keys and shapes tell, and one layout for their experts and gates.

A published sparse MLP is saved with all experts in one tensor, or (FastMoE 1.1) with tensors per expert and its
gate once; both are brought to the first, which is what the layers here have. That a gate is a Noisy one shows in
its parameters. Which of the others it is, how many experts a token takes and how many rows an expert, does not.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from flmoe_kernels.layers.interaction_moe.architecture import Architecture, SparseSpec, build
from flmoe_kernels.layers.interaction_moe.sparse_structure import default_sparse
from flmoe_kernels.layers.routed_mlp.gates import gate_class
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.state import prepare_state_dict

from .file import CheckpointError, CheckpointFile, listed

MLP = r"interaction_experts\.\d+\.fusion_model\.network\.\d+\.mlp\."
DEFAULT_GATE = "GShardGate"
NOISY = "NoisyGate"


def infer_sparse(
    file: CheckpointFile, dim: int, gate: str | None, top_k: int | None
) -> SparseSpec | None:
    """The sparse MLPs that the keys tell of, None where there are none.

    Args:
        file: the checkpoint.
        dim: token width D.
        gate, top_k: as asked for, None for what the file's settings say, else GShardGate (Noisy gates show) and 2
            (SwitchGate: 1).

    Raises:
        CheckpointError: settings that do not fit the parameters, or asked for where there are no sparse MLPs.
    """
    if not any(re.match(MLP + r"(experts|gate|all_gates)\.", key) for key in file.state_dict):
        if gate is not None or top_k is not None:
            name = "top_k" if gate is None else "gate"
            raise CheckpointError(file.path, f"{name}: given, but there are no sparse MLPs")
        return None
    told: Any = file.config.get("sparse")
    told = told if isinstance(told, dict) else {}
    name = _gate(file, gate, told)
    if top_k is None and told.get("gate") == name and isinstance(told.get("top_k"), int):
        top_k = told["top_k"]
    if top_k is None:
        top_k = 1 if name == "SwitchGate" else 2
    routers = _count(file, MLP + r"all_gates\.(\d+)\..*") or 1
    try:
        spec = default_sparse(_experts(file), dim, routers, name, top_k)
    except (TypeError, ValueError) as error:
        raise CheckpointError(file.path, f"sparse MLPs: {error}") from error
    return spec.with_settings(told) if told.get("gate") == name else spec


def in_one_layout(file: CheckpointFile, architecture: Architecture) -> CheckpointFile:
    """The checkpoint with experts in one tensor and gates under both of their names.

    Raises:
        CheckpointError: a gate's two copies differ, or experts that lack a tensor or have one of another shape.
    """
    if architecture.sparse is None:
        return file
    with torch.device("meta"):
        skeleton = build(architecture, num_heads=1)
    state: dict[str, Any] = dict(file.state_dict)
    missing: list[str] = []
    errors: list[str] = []
    for name, part in skeleton.named_modules():
        if isinstance(part, RoutedMLP):
            prepare_state_dict(part, state, f"{name}.", {}, True, missing, [], errors)
    errors += [f'Missing key in state_dict: "{key}".' for key in missing]
    if errors:
        raise CheckpointError(file.path, f"sparse MLPs: {listed(errors)}")
    expected = architecture.parameter_shapes()
    ordered = {key: state[key] for key in expected if key in state}
    return CheckpointFile(file.path, ordered | state, file.config, file.others)


def in_words(sparse: SparseSpec | None) -> str:
    if sparse is None:
        return ""
    return f", sparse with {sparse.num_experts} experts, top {sparse.top_k} of a {sparse.gate}"


def _gate(file: CheckpointFile, asked: str | None, told: dict[str, Any]) -> str:
    """The class of the gates, a name in GATES."""
    noisy = any(re.match(MLP + r"(gate|all_gates\.\d+)\.w_gate$", key) for key in file.state_dict)
    shown = NOISY if noisy else told.get("gate", DEFAULT_GATE)
    try:
        name = gate_class(str(shown if asked is None else asked)).__name__
    except ValueError as error:
        raise CheckpointError(file.path, str(error)) from error
    if noisy != (name == NOISY):
        found = "Noisy gates" if noisy else "gates that are not Noisy"
        raise CheckpointError(file.path, f"gate: expected one for {found}, got {name}")
    return name


def _experts(file: CheckpointFile) -> int:
    if number := _count(file, MLP + r"experts\.(\d+)\..*"):
        return number
    for key, value in file.state_dict.items():
        if re.fullmatch(MLP + r"experts\.htoh4\.weight", key) and value.dim() == 3 and len(value):
            return len(value)
    raise CheckpointError(file.path, "sparse MLPs: no usable tensor experts.htoh4.weight")


def _count(file: CheckpointFile, pattern: str) -> int:
    """One more than the largest number at the pattern's group; no more than there are keys."""
    matches = [re.fullmatch(pattern, key) for key in file.state_dict]
    number = max((int(match[1]) + 1 for match in matches if match), default=0)
    if number > len(file.state_dict):
        raise CheckpointError(file.path, "numbers in its keys exceed the number of its keys")
    return number
