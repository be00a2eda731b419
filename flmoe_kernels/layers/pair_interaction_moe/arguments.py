"""Validation and conversion of the arguments of PairInteractionMoE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import autocast_dtype
from flmoe_kernels.ops.pair_moe.kinds import KINDS, MAX_EXPERTS

Inputs = Sequence[Tensor | None]
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def validate_sizes(
    dims: Sequence[int], num_classes: int | None, kinds: Sequence[str], token_outputs: bool
) -> None:
    """Check the constructor's arguments; TypeError and ValueError name the argument."""
    if not isinstance(dims, (list, tuple)):
        raise TypeError(f"dims: expected a list of widths, got {type(dims).__name__}")
    if len(dims) < 2:
        raise ValueError(f"dims: expected at least 2 modalities, got {len(dims)}")
    for m, dim in enumerate(dims):
        check.require_count(f"dims[{m}]", dim, 2)  # a LayerNorm of one feature is constant
    if not isinstance(token_outputs, bool):
        raise TypeError(f"token_outputs: expected a bool, got {type(token_outputs).__name__}")
    if num_classes is not None:
        check.require_count("num_classes", num_classes, 1)
    elif not token_outputs:
        raise ValueError("num_classes: expected an int, as token_outputs is False; got None")
    if not isinstance(kinds, (list, tuple)):
        raise TypeError(f"kinds: expected a list of names, got {type(kinds).__name__}")
    if not 1 <= len(kinds) <= MAX_EXPERTS:
        raise ValueError(f"kinds: expected 1 to {MAX_EXPERTS} names, got {len(kinds)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: expected names among {', '.join(KINDS)}, got {kind!r}")


def cast_inputs(inputs: Inputs, parameter: Tensor) -> Inputs:
    """Cast inputs to the parameters' dtype, which norms and anchors have, if that loses no precision.

    Under autocast, where an encoder returns low precision, also if it loses some.
    """
    if autocast_dtype(parameter.device) is None or not isinstance(inputs, (list, tuple)):
        return check.widened(inputs, parameter)
    return [
        x.to(parameter.dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST_DTYPES else x
        for x in inputs
    ]


def require_finite_logits(logits: Tensor) -> None:
    """Raise ValueError if logits (B, C) are NaN or inf; not while the call is traced, which reads no values."""
    if torch.compiler.is_compiling() or bool(logits.isfinite().all()):
        return
    wrong = ~logits.isfinite()
    where = f" in sample {int(wrong.any(dim=1).nonzero()[0])}" if len(logits) > 1 else ""
    raise ValueError(
        "inputs: expected valid tokens that are finite and give finite logits, got "
        f"{float(logits[wrong][0])}{where}"
    )


def batch_of(inputs: Inputs) -> int:
    return next(x.shape[0] for x in inputs if x is not None)


def plain_tokens(
    inputs: Inputs, masks: Inputs | None, dims: Sequence[int], like: Tensor
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Sequences (B, L_m, dims[m]) with zeros for masked tokens, and their masks as bool.

    A missing modality becomes a sequence without tokens, with the dtype and device of `like`.
    """
    tokens: list[Tensor] = []
    valid: list[Tensor | None] = []
    for m, x in enumerate(inputs):
        mask = None if masks is None else masks[m]
        if x is None:
            x = like.new_zeros((batch_of(inputs), 0, dims[m]))
        if mask is not None:
            mask = mask.to(torch.bool)
            # The weights' gradients are sums over all tokens: a masked NaN would reach them as 0 * NaN.
            x = x.masked_fill(~mask.unsqueeze(2), 0.0)
        tokens.append(x)
        valid.append(mask)
    return tokens, valid
