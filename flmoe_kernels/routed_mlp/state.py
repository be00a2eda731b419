"""State_dicts of FastMoE's FMoETransformerMLP, brought to the one layout that RoutedMLP has.

    experts.htoh4.weight (E, F, D), .bias (E, F), experts.h4toh.*; gate.*, all_gates.{r}.*     (a)
    experts.{i}.htoh4.weight (1, F, D), .bias (1, F), experts.{i}.h4toh.*; gate.*              (b)

(a) is FL-I2MoE's lineage's, and the one that RoutedMLP saves; (b) is FastMoE 1.1's.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

PIECES = ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias")


def prepare_state_dict(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """A hook before loading: rewrites `state`, and adds to `errors` what torch would not name.

    Keys that it does not know are left for torch's own strict check.
    """
    _stack_experts(module, state, prefix + "experts.", errors)
    _match_gates(state, prefix + "gate.", prefix + "all_gates.", errors)


def _stack_experts(module: Any, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """One tensor for all experts, of one per expert; only if the state has no such tensor yet."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
    if not any(map(numbered.match, state)) or any(prefix + piece in state for piece in PIECES):
        return
    for piece in PIECES:
        keys = [f"{prefix}{expert}.{piece}" for expert in range(module.num_expert)]
        expected = (1, *module.experts.get_parameter(piece).shape[1:])
        problems = [problem for key in keys if (problem := _problem(state, key, expected))]
        errors += problems
        found = [state.pop(key) for key in keys if key in state]
        # A placeholder where something is wrong: the error says what, a missing key would not.
        whole = module.experts.get_parameter(piece) if problems else torch.cat(found)
        state[prefix + piece] = whole.detach()


def _problem(state: dict[str, Any], key: str, expected: tuple[int, ...]) -> str:
    if key not in state:
        return f'Missing key in state_dict: "{key}".'
    value = state[key]
    if not isinstance(value, Tensor):
        return f'"{key}": expected a Tensor, got {type(value).__name__}.'
    if tuple(value.shape) != expected:
        return f"size mismatch for {key}: expected {expected}, got {tuple(value.shape)}."
    return ""


def _match_gates(state: dict[str, Any], gate: str, routers: str, errors: list[str]) -> None:
    """The gate is saved twice: its copies must agree, and where there are no routers it is the only one."""
    own = [key for key in state if key.startswith(gate)]
    if not any(key.startswith(routers) for key in state):
        for key in own:
            state[f"{routers}0.{key.removeprefix(gate)}"] = state[key]
        return
    for key in own:
        twin = f"{routers}0.{key.removeprefix(gate)}"
        if twin in state and not _same(state[key], state[twin]):
            errors.append(f'"{key}" and "{twin}" differ, but are one gate.')


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return a.shape == b.shape
    return bool(torch.isclose(a, b.to(a), rtol=0.0, atol=0.0, equal_nan=True).all())
