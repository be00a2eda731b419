"""Experts of Hugging Face transformers models on routed_mlp."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import moe

from flmoe_kernels.ops.routed_mlp.api import routed_mlp

__all__ = ["experts_forward", "register"]

# By class, because models have different names for the setting and a subclass may compute something else.
_ACTIVATIONS = {
    F.silu: "silu",
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["swish"]): "silu",
    type(ACT2FN["gelu"]): "gelu",
    type(ACT2FN["gelu_new"]): "gelu_tanh",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
    type(ACT2FN["relu"]): "relu",
}


def register(name: str = "flmoe") -> None:
    """Make `experts_implementation=name` of transformers models compute their experts with `routed_mlp`."""
    moe.ExpertsInterface.register(name, experts_forward)


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Weighted sum of the experts' outputs, an implementation for transformers' `ExpertsInterface`.

    Supported are experts with and without gates, with the activations of `routed_mlp`, with and without biases,
    with weights (E, out, in) or transposed ones, also in expert-parallel models.

    Args:
        experts: module with the attributes that `use_experts_implementation` sets.
        hidden_states: (N, D); computed in the dtype of the weights, as by "grouped_mm".
        top_k_index: (N, K); in an expert-parallel model, E, the number of local experts, marks those of other
            ranks.
        top_k_weights: (N, K).

    Returns:
        (N, D) in the dtype of hidden_states. Differentiable with respect to hidden_states, top_k_weights
        and all parameters.

    Raises:
        ValueError: an activation, gate or norm that `routed_mlp` does not compute.

    Cost: that of `routed_mlp`. Transposed weights are copied in every call.
    """
    act = _activation(experts)

    def parameters(name: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
        return weight.mT if experts.is_transposed else weight, bias if experts.has_bias else None

    w_out, b_out = parameters("down_proj")
    w_in, b_in = parameters("gate_up_proj" if experts.has_gate else "up_proj")
    w_gate = b_gate = None
    if experts.has_gate:
        w_gate, w_in = w_in.chunk(2, dim=1)
        b_gate, b_in = (None, None) if b_in is None else b_in.chunk(2, dim=1)
    if experts._is_expert_parallel:
        top_k_index = top_k_index.masked_fill(top_k_index >= w_in.shape[0], -1)
    x, weight = hidden_states.to(w_in.dtype), top_k_weights.to(w_in.dtype)
    out = routed_mlp(
        *(x, top_k_index, weight, w_in, b_in, w_out, b_out), act=act, w_gate=w_gate, b_gate=b_gate
    )
    return out.to(hidden_states.dtype)


def _activation(experts: Any) -> str:
    """Name of the activation for `routed_mlp`."""
    kind, use = type(experts), 'use experts_implementation="grouped_mm"'
    if experts.has_gate and kind._apply_gate is not moe._default_apply_gate:
        raise ValueError(
            f"experts: expected the gate act_fn(gate) * up, got _apply_gate of {kind.__name__}; {use}"
        )
    if experts.has_post_expert_norm:
        raise ValueError(
            f"experts: expected no norm after them, got that of {kind.__name__}; {use}"
        )
    act_fn = experts.act_fn
    act = _ACTIVATIONS.get(act_fn if act_fn is F.silu else type(act_fn))
    if act is None:
        raise ValueError(
            "experts: expected act_fn silu, gelu, gelu_new, gelu_pytorch_tanh or relu, "
            f"got {act_fn}; {use}"
        )
    return act
