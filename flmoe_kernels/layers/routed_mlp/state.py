"""Conversion of FMoETransformerMLP's state_dicts to RoutedMLP's layout.

    experts.htoh4.weight (E, F, D), .bias (E, F), experts.h4toh.*; gate.*, all_gates.{r}.*     (a)
    experts.{i}.htoh4.weight (1, F, D), .bias (1, F), experts.{i}.h4toh.*; gate.*              (b)

(a) is the layout of FL-I2MoE's lineage and of RoutedMLP; (b) is that of FastMoE 1.1.
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
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Rewrite `state` before loading; adds to `missing` and `errors` what torch would not report."""
    _stack_experts(module, state, prefix + "experts.", missing, errors)
    _match_gates(state, prefix + "gate.", prefix + "all_gates.0.", missing, errors)


def _stack_experts(
    module: Any, state: dict[str, Any], prefix: str, missing: list[str], errors: list[str]
) -> None:
    """Combine the tensors of single experts to one tensor for all, unless the state already has it.

    If the state is loaded although an expert is missing, that expert keeps its present values; on the meta device,
    where it has no values, a missing expert is an error.
    """
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
    if not any(map(numbered.match, state)) or any(prefix + piece in state for piece in PIECES):
        return
    for piece in PIECES:
        own = module.experts.get_parameter(piece).detach()
        pieces: dict[int, Tensor] = {}
        for expert in range(module.num_expert):
            key = f"{prefix}{expert}.{piece}"
            if key not in state:
                if own.is_meta:
                    errors.append(f'Missing key in state_dict: "{key}".')
                else:
                    missing.append(key)
                continue
            value, expected = state.pop(key), (1, *own.shape[1:])
            if not isinstance(value, Tensor):
                errors.append(f'"{key}": expected a Tensor, got {type(value).__name__}.')
            elif value.shape != expected:
                errors.append(
                    f"size mismatch for {key}: expected {expected}, got {tuple(value.shape)}."
                )
            else:
                pieces[expert] = value
        if len(pieces) == module.num_expert:
            state[prefix + piece] = torch.cat(list(pieces.values()))
            continue
        state[prefix + piece] = own.clone()
        for expert, value in pieces.items():
            state[prefix + piece][expert : expert + 1] = value


def _match_gates(
    state: dict[str, Any], gate: str, router_0: str, missing: list[str], errors: list[str]
) -> None:
    """Remove router 0, which is the gate, after a check that the two saved copies agree."""
    if not any(key.startswith(router_0) for key in state):
        return
    for key in [key for key in state if key.startswith(gate)]:
        twin = router_0 + key.removeprefix(gate)
        if twin not in state:
            missing.append(twin)
        elif not _same(state[key], state.pop(twin)):
            errors.append(f'"{key}" and "{twin}" differ, but are the same gate.')


def add_router_0(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Add the gate as router 0 to a state_dict, before the other routers, as published."""
    gate, routers = prefix + "gate.", prefix + "all_gates."
    others = {key: state.pop(key) for key in list(state) if key.startswith(routers)}
    for key in [key for key in state if key.startswith(gate)]:
        state[f"{routers}0.{key.removeprefix(gate)}"] = state[key]
    state.update(others)


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return a.shape == b.shape
    return bool(torch.isclose(a, b.to(a), rtol=0.0, atol=0.0, equal_nan=True).all())
