"""The door of the layer: validation of what goes in, one message per mistake."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flmoe_kernels.core import validation as check

from .architecture import LayerSpec
from .reference import Masks, Replacements


def validate_inputs(
    spec: LayerSpec, inputs: Sequence[Tensor], masks: Masks, parameter: Tensor
) -> None:
    """Inputs M x (B, L_m, D) of the parameters' dtype and device; masks M x (B, L_m), bool or 0/1, or None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(inputs, list | tuple):
        raise TypeError(f"inputs: expected a list of Tensors, got {type(inputs).__name__}")
    if len(inputs) != spec.num_modalities:
        raise ValueError(f"inputs: expected {spec.num_modalities} modalities, got {len(inputs)}")
    for m, x in enumerate(inputs):
        name = f"inputs[{m}]"
        check.require_tensor(name, x)
        if x.dim() != 3 or x.shape[2] != spec.hidden_dim or x.shape[1] < 1:
            raise ValueError(
                f"{name}: expected (batch, tokens, {spec.hidden_dim}), got {tuple(x.shape)}"
            )
        if x.shape[0] != inputs[0].shape[0]:
            raise ValueError(
                f"{name}: expected batch {inputs[0].shape[0]} as inputs[0], got {x.shape[0]}"
            )
        if spec.num_patches is not None and x.shape[1] != spec.num_patches:
            raise ValueError(
                f"{name}: expected {spec.num_patches} tokens, as many as learned positions, "
                f"got {x.shape[1]}"
            )
        check.require_same(name, x, "the layer's parameters", parameter)
    given = isinstance(masks, list | tuple) and any(mask is not None for mask in masks)
    if given and spec.compat == "i2moe":
        raise ValueError("masks: a layer with learned positions (I2MoE) takes none")
    check.require_masks(inputs, masks)


def validate_replacements(
    spec: LayerSpec, replacements: Replacements | None, inputs: Sequence[Tensor]
) -> None:
    """replacements[e][m] shaped, typed and placed as inputs[m], for all M + 2 experts."""
    if replacements is None:
        return
    if not isinstance(replacements, list | tuple):
        raise TypeError(f"replacements: expected a list, got {type(replacements).__name__}")
    if len(replacements) != spec.num_experts:
        raise ValueError(
            f"replacements: expected one list per expert, {spec.num_experts}, got {len(replacements)}"
        )
    for e, each in enumerate(replacements):
        if not isinstance(each, list | tuple):
            raise TypeError(f"replacements[{e}]: expected a list, got {type(each).__name__}")
        if len(each) != len(inputs):
            raise ValueError(
                f"replacements[{e}]: expected {len(inputs)} modalities, got {len(each)}"
            )
        for m, (noise, x) in enumerate(zip(each, inputs, strict=True)):
            name = f"replacements[{e}][{m}]"
            check.require_tensor(name, noise)
            if noise.shape != x.shape:
                raise ValueError(
                    f"{name}: expected {tuple(x.shape)} as inputs[{m}], got {tuple(noise.shape)}"
                )
            check.require_same(name, noise, f"inputs[{m}]", x)
