"""Validation of the layer's inputs, masks and replacements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.layers.modalities import Masks, Modalities

from .architecture import LayerSpec
from .reference import Replacements


def validate_inputs(
    widths: Sequence[int],
    num_patches: int | None,
    inputs: Sequence[Tensor | None],
    masks: Masks,
    parameter: Tensor,
    *,
    complete: bool = False,
) -> None:
    """Check inputs, M x (B, L_m, D) like the parameters, and masks, M x (B, L_m), bool or 0/1, or None.

    num_patches: L_m of all modalities, None for any.
    complete: require tokens for every modality, and no masks with learned positions.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names it, what was expected and what it got.
    """
    check.require_inputs(widths, inputs, masks, parameter, optional=not complete)
    for m, x in enumerate(inputs):
        if num_patches is not None and x is not None and x.shape[1] not in (0, num_patches):
            raise ValueError(
                f"inputs[{m}]: expected {num_patches} tokens, the number of positions, "
                f"got {x.shape[1]}"
            )
    if complete and num_patches is not None and any(mask is not None for mask in masks or ()):
        raise ValueError("masks: expected None for learned positions (I2MoE)")


def check_replacements(
    spec: LayerSpec, replacements: Replacements | None, call: Modalities
) -> Replacements | None:
    """Check that replacements[e][m] has the shape, dtype and device of inputs[m], for all experts.

    Returns:
        The replacements; None for a missing modality becomes its padded input.
    """
    if replacements is None:
        return None
    if not isinstance(replacements, (list, tuple)):
        raise TypeError(f"replacements: expected a list, got {type(replacements).__name__}")
    if len(replacements) != spec.num_experts:
        raise ValueError(
            f"replacements: expected one list per expert, {spec.num_experts}, got {len(replacements)}"
        )
    filled = []
    for e, each in enumerate(replacements):
        if isinstance(each, (list, tuple)) and len(each) == len(call.inputs):
            missing = zip(each, call.inputs, call.absent, strict=True)
            each = [x if noise is None and absent else noise for noise, x, absent in missing]
        check.require_replacements(f"replacements[{e}]", each, call.inputs)
        filled.append(each)
    return filled


def stack_replacements(replacements: Replacements) -> Tensor:
    """The tokens that replace all modalities: (E, B, L, D), or (B, L, D) if all experts share them."""
    first = replacements[0]
    if all(x is y for each in replacements for x, y in zip(each, first, strict=True)):
        return torch.cat(list(first), dim=1)
    return torch.stack([torch.cat(list(each), dim=1) for each in replacements])
