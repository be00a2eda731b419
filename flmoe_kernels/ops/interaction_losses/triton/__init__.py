"""The interaction losses through Triton: launch table, allocations and launches.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.operands import contiguous, expect, expect_float32_or_half
from flmoe_kernels.core.triton.launches import Launch, run
from flmoe_kernels.core.triton.plans import planned
from flmoe_kernels.core.triton.tables import RowTiles, blocks_of

from ..call import check_shapes
from .kernels import gradient_kernel, losses_kernel, mean_kernel

__all__ = ["losses", "losses_backward"]

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


@planned(2)
def losses(latents: Tensor, exists: Tensor | None) -> Tensor:
    latents, exists = _checked(latents, exists)
    experts, batch = latents.shape[0], latents.shape[2]
    if not batch:
        return latents.new_full((experts,), float("nan"))
    out = latents.new_empty((experts,))
    blocks = blocks_of(batch, TABLE["losses"].shape(latents.shape[3])[0])
    parts = latents.new_empty((experts, blocks), dtype=torch.float32)
    first = _launch(losses_kernel, "losses", latents, exists, 1, parts=parts)
    mean = Launch(
        mean_kernel,
        experts,
        {"parts": parts, "losses": out, "blocks": blocks},
        {"BLOCKS": TABLE["mean"].elements},
        TABLE["mean"].warps,
        _STAGES,
    )
    run([first, mean], latents.device)
    return out


@planned(3)
def losses_backward(grad_losses: Tensor, latents: Tensor, exists: Tensor | None) -> Tensor:
    latents, exists = _checked(latents, exists)
    expect("grad_losses", grad_losses, latents.shape[:1], latents.dtype, latents.device)
    grad = torch.empty_like(latents)
    if grad.numel():
        chunks = blocks_of(latents.shape[3], TABLE["gradient"].shape(latents.shape[3])[1])
        tensors = {"grad_losses": grad_losses.contiguous(), "grad_latents": grad}
        launch = _launch(gradient_kernel, "gradient", latents, exists, chunks, **tensors)
        run([launch], latents.device)
    return grad


def _launch(
    kernel: Any, name: str, latents: Tensor, exists: Tensor | None, chunks: int, **tensors: Tensor
) -> Launch:
    """One program for each expert, block of samples and one of `chunks` chunks of columns."""
    experts, views, batch, width = latents.shape
    rows, chunk = TABLE[name].shape(width)
    blocks = blocks_of(batch, rows)
    return Launch(
        kernel,
        experts * blocks * chunks,
        {
            **{"latents": latents, "exists": exists, **tensors},
            **{"batch": batch, "width": width, "blocks": blocks},
        },
        {"UNIQUE": experts - 2, "VIEWS": views, "ROWS": rows, "CHUNK": chunk},
        TABLE[name].warps,
        _STAGES,
    )


def _checked(latents: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor | None]:
    expect_float32_or_half("latents", latents)
    check_shapes(latents, exists)
    return latents.contiguous(), contiguous(exists)
