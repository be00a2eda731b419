"""How the kernels of interaction_moe are launched: tiles, warps, arguments. Tensors are contiguous unless said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch

from .kernels import gradient_kernel, losses_kernel, mean_kernel
from .mixture_kernels import (
    features_gradient_kernel,
    features_kernel,
    mix_gradient_kernel,
    mix_kernel,
)


@dataclass(frozen=True)
class Tiles:
    """Elements that a program holds of a tensor at a time, the most columns of them, warps.

    shared: bytes per block, the most on sm_80, sm_90 and sm_100 in the static test's cases; with Triton 3.7.1,
    whose numbers that test holds this table to.
    """

    elements: int
    columns: int
    warps: int
    shared: int


# The same for every architecture, class of shape and dtype: these kernels are bound by bytes or by latency, and
# all that shapes decide is how many programs there are. The losses take a sample of up to 512 columns a program,
# the gradient, which holds four such tiles, twice that: more spills a few bytes on one architecture or another.
# "features" holds all columns of a token, 4096 elements and as many sums. "mix" is one program of one warp for
# eight samples: its work is nothing and its launch all. What is fastest has not been measured.
TABLE = {
    "losses": Tiles(512, 512, 4, 16),
    "mean": Tiles(64, 64, 1, 0),
    "gradient": Tiles(1024, 512, 4, 32),
    "features": Tiles(4096, 1 << 20, 8, 8192),
    "features_gradient": Tiles(4096, 1 << 20, 8, 4096),
    "mix": Tiles(1024, 128, 1, 32),
    "mix_gradient": Tiles(1024, 128, 1, 128),
}
_STAGES = 2


def lanes(count: int) -> int:
    """The least power of two that holds `count`."""
    return 1 << max(count - 1, 0).bit_length()


def tile_of(kernel: str, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that a program holds, powers of two."""
    tiles = TABLE[kernel]
    chunk = min(lanes(columns), tiles.columns)
    return min(lanes(rows), max(1, tiles.elements // chunk)), chunk


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def loss_blocks(latents: Tensor) -> int:
    """Parts that the loss of each expert comes in."""
    batch, width = latents.shape[2:]
    return _blocks(batch, tile_of("losses", batch, width)[0])


def loss_launches(latents: Tensor, parts: Tensor | None, losses: Tensor) -> list[Launch]:
    """Losses (E,) of latents (E, V, B, width); parts (E, loss_blocks) float32, None where that is one block."""
    experts, views, batch, width = latents.shape
    rows, chunk = tile_of("losses", batch, width)
    blocks = loss_blocks(latents)
    found = [
        Launch(
            losses_kernel,
            experts * blocks,
            {
                **{"latents": latents, "parts": losses if parts is None else parts},
                **{"batch": batch, "width": width, "blocks": blocks},
            },
            {"VIEWS": views, "ROWS": rows, "CHUNK": chunk},
            TABLE["losses"].warps,
            _STAGES,
        )
    ]
    if parts is not None:
        found.append(
            Launch(
                mean_kernel,
                experts,
                {"parts": parts, "losses": losses, "blocks": blocks},
                {"BLOCKS": TABLE["mean"].elements},
                TABLE["mean"].warps,
                _STAGES,
            )
        )
    return found


def gradient_launch(grad_losses: Tensor, latents: Tensor, grad_latents: Tensor) -> Launch:
    experts, views, batch, width = latents.shape
    rows, chunk = tile_of("gradient", batch, width)
    blocks = _blocks(batch, rows)
    return Launch(
        gradient_kernel,
        experts * blocks * _blocks(width, chunk),
        {
            **{"grad_losses": grad_losses, "latents": latents, "grad_latents": grad_latents},
            **{"batch": batch, "width": width, "blocks": blocks},
        },
        {"VIEWS": views, "ROWS": rows, "CHUNK": chunk},
        TABLE["gradient"].warps,
        _STAGES,
    )


def features_launch(
    tokens: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
    normalized: int,
    features: Tensor,
    statistics: Tensor,
) -> Launch:
    """features (B, M * D) and statistics (B, M, 2) float32 of tokens (B, L, D)."""
    batch, total, width = tokens.shape
    rows, chunk = tile_of("features", max(lengths), width)
    return Launch(
        features_kernel,
        batch * len(lengths),
        {
            **{"tokens": tokens, "mask": mask, "features": features, "statistics": statistics},
            **{"lengths": tuple(lengths), "normalized": normalized, "total": total},
        },
        {"WIDTH": width, "CHUNK": chunk, "TOKENS": rows},
        TABLE["features"].warps,
        _STAGES,
    )


def features_gradient_launch(
    grad_features: Tensor,
    features: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
    grad_tokens: Tensor,
) -> Launch:
    batch, total, width = grad_tokens.shape
    rows, chunk = tile_of("features_gradient", max(lengths), width)
    slots = _blocks(max(lengths), rows)
    return Launch(
        features_gradient_kernel,
        batch * len(lengths) * slots,
        {
            **{"grad_features": grad_features, "features": features, "statistics": statistics},
            **{"mask": mask, "grad_tokens": grad_tokens, "lengths": tuple(lengths)},
            **{"total": total, "slots": slots},
        },
        {"WIDTH": width, "CHUNK": chunk, "TOKENS": rows},
        TABLE["features_gradient"].warps,
        _STAGES,
    )


def mix_launch(
    scores: Tensor, logits: Tensor, temperature: float, weights: Tensor, mixed: Tensor
) -> Launch:
    """weights (B, E) and mixed (B, C) of scores (B, E) and logits (E, B, C), whose first stride is free."""
    return _mix("mix", logits, temperature, scores=scores, weights=weights, mixed=mixed)


def mix_gradient_launch(
    grad_weights: Tensor | None,
    grad_mixed: Tensor | None,
    weights: Tensor,
    logits: Tensor,
    temperature: float,
    grads: tuple[Tensor, Tensor],
) -> Launch:
    """Gradients of scores and logits, the latter contiguous."""
    return _mix(
        "mix_gradient",
        logits,
        temperature,
        grad_weights=grad_weights,
        grad_mixed=grad_mixed,
        weights=weights,
        grad_scores=grads[0],
        grad_logits=grads[1],
    )


def _mix(name: str, logits: Tensor, temperature: float, **tensors: Tensor | None) -> Launch:
    experts, batch, classes = logits.shape
    rows, chunk = tile_of(name, min(batch, 8), classes)
    return Launch(
        mix_kernel if name == "mix" else mix_gradient_kernel,
        _blocks(batch, rows),
        {
            **tensors,
            **{"logits": logits, "of_expert": logits.stride(0), "temperature": temperature},
            **{"batch": batch, "classes": classes},
        },
        {"EXPERTS": experts, "LANES": lanes(experts), "ROWS": rows, "CHUNK": chunk},
        TABLE[name].warps,
        _STAGES,
    )


def call_launches(
    latents: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
    logits: Tensor,
) -> dict[str, Launch]:
    """Every launch of one training step of the layer by its row in TABLE; any device, meta included."""
    experts, _, batch, _ = latents.shape
    statistics = tokens.new_empty((batch, len(lengths), 2), dtype=torch.float32)
    features = tokens.new_empty((batch, len(lengths) * tokens.shape[2]))
    parts = latents.new_empty((experts, loss_blocks(latents)), dtype=torch.float32)
    losses, weights = latents.new_empty((experts,)), logits.new_empty((batch, experts))
    mixed = logits[0]
    normalized = 0 if mask is None else (1 << len(lengths)) - 1
    first, mean = loss_launches(latents, parts, losses)
    return {
        "losses": first,
        "mean": mean,
        "gradient": gradient_launch(losses, latents, latents),
        "features": features_launch(tokens, mask, lengths, normalized, features, statistics),
        "features_gradient": features_gradient_launch(
            features, features, statistics, mask, lengths, tokens
        ),
        "mix": mix_launch(weights, logits, 1.0, weights, mixed),
        "mix_gradient": mix_gradient_launch(
            weights, mixed, weights, logits, 1.0, (weights, logits)
        ),
    }
