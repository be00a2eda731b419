"""Validation of the layer's inputs, masks and replacements."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flmoe_kernels.core import validation as check

from .architecture import LayerSpec
from .fusion import Masks
from .reference import Replacements


def validate_inputs(
    widths: Sequence[int],
    num_patches: int | None,
    inputs: Sequence[Tensor],
    masks: Masks,
    parameter: Tensor,
) -> None:
    """Check inputs, M x (B, L_m, D) like the parameters, and masks, M x (B, L_m), bool or 0/1, or None.

    num_patches: L_m of all modalities, None for any.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names it, what was expected and what it got.
    """
    check.require_inputs(widths, inputs, masks, parameter)
    for m, x in enumerate(inputs):
        if num_patches is not None and x.shape[1] != num_patches:
            raise ValueError(
                f"inputs[{m}]: expected {num_patches} tokens, the number of positions, "
                f"got {x.shape[1]}"
            )
    if num_patches is not None and any(mask is not None for mask in masks or ()):
        raise ValueError("masks: expected None for learned positions (I2MoE)")


def validate_replacements(
    spec: LayerSpec, replacements: Replacements | None, inputs: Sequence[Tensor]
) -> None:
    """Check that replacements[e][m] has the shape, dtype and device of inputs[m], for all M + 2 experts."""
    if replacements is None:
        return
    if not isinstance(replacements, list | tuple):
        raise TypeError(f"replacements: expected a list, got {type(replacements).__name__}")
    if len(replacements) != spec.num_experts:
        raise ValueError(
            f"replacements: expected one list per expert, {spec.num_experts}, got {len(replacements)}"
        )
    for e, each in enumerate(replacements):
        check.require_replacements(f"replacements[{e}]", each, inputs)
