"""Shape and parameters of a user's checkpoint, which is profiled like a named shape of the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flmoe_kernels.core.dtypes import dtype_name
from flmoe_kernels.layers.interaction_moe.structure import describe
from flmoe_kernels.published.convert import load_layer

from .cases import BadRequest
from .shapes import UserShape


def user_shape(
    path: str,
    batch: int | None = None,
    tokens: tuple[int, ...] | None = None,
    valid: tuple[int, ...] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> UserShape:
    """Return the shape of a checkpoint.

    Args:
        batch: number of samples; default 32.
        tokens: of each modality; None if learned positions determine them.
        valid: number of tokens of each modality that are not padding; None for all.
        settings: num_heads, temperature, layer, gate, top_k of `published.convert.load_layer`.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        BadRequest: batch, tokens or valid do not fit the checkpoint.
    """
    layer = load_layer(path, **(settings or {}))
    spec = describe(layer)
    batch = 32 if batch is None else batch
    if batch < 1:
        raise BadRequest(f"batch: expected at least 1, got {batch}")
    count, learned = spec.num_modalities, spec.num_patches is not None
    if spec.num_patches is not None:
        fixed = (spec.num_patches,) * count
        if tokens not in (None, fixed):
            raise BadRequest(
                f"tokens: learned positions fix them to {_listed(fixed)}, got {_listed(tokens or ())}"
            )
        tokens = fixed
    if tokens is None or len(tokens) != count or min(tokens) < 1:
        got = "none" if tokens is None else _listed(tokens)
        raise BadRequest(f"tokens: expected {count} positive numbers, one per modality, got {got}")
    if valid is not None and learned:
        raise BadRequest("valid: not supported for a layer with learned positions")
    if valid is not None and (
        len(valid) != count or any(not 1 <= n <= m for n, m in zip(valid, tokens, strict=True))
    ):
        raise BadRequest(
            f"valid: expected {count} numbers from 1 to {_listed(tokens)}, got {_listed(valid)}"
        )
    return UserShape(
        name=f"{Path(path).stem}, batch {batch}",
        batch=batch,
        tokens=tokens,
        valid=(None,) * count if valid is None else valid,
        dim=spec.hidden_dim,
        heads=spec.num_heads,
        layers=spec.num_layers,
        classes=spec.num_classes,
        temperature=spec.temperature,
        experts=0 if spec.sparse is None else spec.sparse.num_experts,
        path=path,
        settings=tuple((settings or {}).items()),
        dtype=dtype_name(next(layer.parameters()).dtype),
    )


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
