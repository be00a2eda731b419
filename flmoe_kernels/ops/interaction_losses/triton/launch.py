"""Launches of the interaction losses; tensors are contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.tables import RowTiles, blocks_of

from .kernels import gradient_kernel, losses_kernel, mean_kernel

# The same for every architecture, class of shape and dtype: these kernels are bound by bytes or by latency, and
# all that shapes decide is how many programs there are. The losses take a sample of up to 512 columns a program,
# the gradient, which holds four such tiles, twice that: more spills a few bytes on one architecture or another.
# The fastest choice has not been measured.
TABLE = {
    "losses": RowTiles(512, 512, 4, 16),
    "mean": RowTiles(64, 64, 1, 0),
    "gradient": RowTiles(1024, 512, 4, 32),
}
_STAGES = 2


def loss_blocks(latents: Tensor) -> int:
    """Number of partial sums of each expert's loss."""
    batch, width = latents.shape[2:]
    return blocks_of(batch, TABLE["losses"].shape(width)[0])


def loss_launches(
    latents: Tensor, exists: Tensor | None, parts: Tensor, losses: Tensor
) -> list[Launch]:
    """Launches of losses (E,) from latents (E, V, B, width); parts (E, loss_blocks) float32."""
    experts, views, batch, width = latents.shape
    rows, chunk = TABLE["losses"].shape(width)
    blocks = loss_blocks(latents)
    return [
        Launch(
            losses_kernel,
            experts * blocks,
            {
                **{"latents": latents, "exists": exists, "parts": parts},
                **{"batch": batch, "width": width, "blocks": blocks},
            },
            {"UNIQUE": experts - 2, "VIEWS": views, "ROWS": rows, "CHUNK": chunk},
            TABLE["losses"].warps,
            _STAGES,
        ),
        Launch(
            mean_kernel,
            experts,
            {"parts": parts, "losses": losses, "blocks": blocks},
            {"BLOCKS": TABLE["mean"].elements},
            TABLE["mean"].warps,
            _STAGES,
        ),
    ]


def gradient_launch(
    grad_losses: Tensor, latents: Tensor, exists: Tensor | None, grad_latents: Tensor
) -> Launch:
    experts, views, batch, width = latents.shape
    rows, chunk = TABLE["gradient"].shape(width)
    blocks = blocks_of(batch, rows)
    return Launch(
        gradient_kernel,
        experts * blocks * blocks_of(width, chunk),
        {
            **{"grad_losses": grad_losses, "latents": latents, "exists": exists},
            **{"grad_latents": grad_latents},
            **{"batch": batch, "width": width, "blocks": blocks},
        },
        {"UNIQUE": experts - 2, "VIEWS": views, "ROWS": rows, "CHUNK": chunk},
        TABLE["gradient"].warps,
        _STAGES,
    )


def call_launches(latents: Tensor, exists: Tensor | None = None) -> dict[str, Launch]:
    """All launches of a training step by their key in TABLE; for any device, including meta."""
    experts = latents.shape[0]
    parts = latents.new_empty((experts, loss_blocks(latents)), dtype=torch.float32)
    losses = latents.new_empty((experts,))
    first, mean = loss_launches(latents, exists, parts, losses)
    gradient = gradient_launch(losses, latents, exists, latents)
    return {"losses": first, "mean": mean, "gradient": gradient}
