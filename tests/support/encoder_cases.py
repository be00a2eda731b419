"""Small calls of the layer's operators and of their backward operators."""

from __future__ import annotations

from typing import Any

import torch

from flmoe_kernels.ops.encoder.inference import layer_shapes
from tests.support.inputs import as_dtype, cumulative, draw, make_seed
from tests.support.operator_cases import EPS

# Sizes and forms of encoder_layers.
EXPERTS, LAYERS, WIDTH, HIDDEN = 2, 2, 4, 6
FORMS = ("one view", "views", "folded views")


def norm_arguments(rows: int, width: int, p: float, residual: bool, experts: int = 2) -> list[Any]:
    """Arguments of dropout_add_norm."""
    seed = make_seed() if p else None
    x, update = draw(experts, rows, width, seed=1, scale=2), draw(experts, rows, width, seed=2)
    gain, shift = draw(experts, width, seed=3) + 1, draw(experts, width, seed=4)
    return [x if residual else None, update, gain, shift, seed, p, EPS]


def identity_mlp(x: torch.Tensor) -> list[torch.Tensor]:
    """Arguments of expert_mlp whose weights are identities: its result is dropout(GELU(x))."""
    experts, _, width = x.shape
    eye = torch.eye(width, dtype=x.dtype).repeat(experts, 1, 1)
    zero = torch.zeros(experts, width, dtype=x.dtype)
    return [x, eye, zero, eye, zero]


def mlp_arguments(
    experts: int, rows: int, sizes: tuple[int, int, int], p: float, scale: float = 1.0
) -> list[Any]:
    """Arguments of expert_mlp; sizes: input, hidden and output width."""
    in_width, hidden, out_width = sizes
    shapes = ((hidden, in_width), (hidden,), (out_width, hidden), (out_width,))
    scales = (scale * in_width**-0.5, 1.0, hidden**-0.5, 1.0)
    weights = [
        draw(experts, *shape, seed=i, scale=size)
        for i, (shape, size) in enumerate(zip(shapes, scales, strict=True))
    ]
    seed = make_seed() if p else None
    return [draw(experts, rows, in_width, seed=4), *weights, seed, p]


def operator_calls(
    dtype: torch.dtype, p: float, rows: int = 5, width: int = 4, experts: int = 2
) -> dict[str, list[Any]]:
    """Arguments of all operators with a gradient: two views, and rows outside all segments."""
    seed = make_seed() if p else None
    norm = as_dtype(norm_arguments(rows, width, p, True, experts), dtype)
    plain = as_dtype(norm_arguments(rows, width, p, False, experts), dtype)
    views = [draw(experts, 2 * rows, width, dtype=dtype, seed=i) for i in (1, 2)]
    weight, bias = (draw(experts, *shape, dtype=dtype, seed=3) for shape in ((6, width), (6,)))
    runs, modality = cumulative([rows // 2, 1]), (torch.arange(rows) % 2).to(torch.int32)
    return {
        "expert_linear": [views[0], weight, bias],
        "expert_linear without bias": [views[0], weight, None],
        "expert_norm": [norm[0], norm[2], norm[3], EPS],
        "dropout_add_norm": norm,
        "dropout_add_norm without residual": plain,
        "expert_mlp": as_dtype(mlp_arguments(experts, 2 * rows, (width, 7, 6), p), dtype),
        "dropout_add_pool": [*views, runs, 2, seed, p],
        "expand_views": [draw(experts, 2, rows, width, dtype=dtype), modality, 3],
        "interaction_losses": [draw(4, 3, 2, 5, dtype=dtype), None],
    }


def layers_arguments(
    form: str, rate: float = 0.25, width: int = WIDTH, hidden: int = HIDDEN, **changes: Any
) -> list[Any]:
    """Arguments of encoder_layers: two samples of two segments, of 3 and 2 rows."""
    shapes = EXPERTS * LAYERS * layer_shapes(width, hidden)
    weights = [draw(*shape, seed=i, scale=0.7) for i, shape in enumerate(shapes)]
    segments = torch.tensor([0, 2, 3, 4, 5], dtype=torch.int32)
    modality = torch.tensor([0, 0, 1, 0, 1], dtype=torch.int32)
    source = None
    if form == "folded views":
        # The second view has only the first sample.
        source = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2])
        segments = torch.tensor([0, 2, 3, 4, 5, 7, 8, 8, 8], dtype=torch.int32)
    named: dict[str, Any] = {
        "rows": draw(EXPERTS, 1 if form == "one view" else 2, 5, width, seed=90),
        "modality": modality if form == "views" else None,
        "source": source,
        "cu_samples": segments[::2].contiguous(),
        "cu_segments": segments,
        "count": None,
        "weights": weights,
        "seeds": torch.arange(4 * LAYERS) if rate else None,
        "rates": [rate, 0.0, rate, rate] * LAYERS,
        "heads": 2,
        "views": 3 if form == "views" else 1,
        "eps": 1e-5,
        "self_residual": False,
        "save": True,
        **changes,
    }
    return list(named.values())


def encoder_inference_arguments(**changes: Any) -> tuple[Any, ...]:
    """Arguments of encoder_inference: two experts, one layer of width 8; three samples of two segments."""
    weights = [draw(*shape, seed=i) for i, shape in enumerate(2 * layer_shapes(8, 12))]
    bounds = torch.tensor([0, 2, 3, 3, 4, 4, 6], dtype=torch.int32)
    named = {
        "rows": draw(1, 5, 8, seed=50),
        "index": torch.tensor([4, 0, 1, 1, 2, 3]),
        "cu_samples": bounds[::2].contiguous(),
        "cu_segments": bounds,
        "weights": weights,
        "experts": 2,
        "heads": 2,
        "eps": 1e-5,
        "self_residual": False,
        **changes,
    }
    return tuple(named.values())
