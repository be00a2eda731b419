"""One call of the routed MLP as its launches take it: contiguous tensors that agree, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import expect

# Places are int32, and so are the kernels' sums of a few more of them.
_MOST_ROWS = 2**30


@dataclass(frozen=True)
class RoutedCall:
    x: Tensor
    weight: Tensor
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    offsets: Tensor
    permutation: Tensor
    act: int

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def choices(self) -> int:
        return self.weight.shape[1]

    @property
    def rows(self) -> int:
        return self.tokens * self.choices

    @property
    def experts(self) -> int:
        return self.w_in.shape[0]

    @property
    def width(self) -> int:
        return self.x.shape[1]

    @property
    def hidden(self) -> int:
        return self.w_in.shape[1]


def checked(
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
    act: int,
) -> RoutedCall:
    """The call with copies of what is not contiguous; ValueError for what the kernels must not read."""
    experts, hidden, width = w_in.shape
    tokens, choices = weight.shape
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "x": (x, (tokens, width), x.dtype),
        "weight": (weight, (tokens, choices), x.dtype),
        "w_in": (w_in, (experts, hidden, width), x.dtype),
        "b_in": (b_in, (experts, hidden), x.dtype),
        "w_out": (w_out, (experts, width, hidden), x.dtype),
        "b_out": (b_out, (experts, width), x.dtype),
        "offsets": (offsets, (experts + 1,), torch.int32),
        "permutation": (permutation, (tokens * choices,), torch.int32),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        expect(name, tensor, shape, dtype, x.device)
    check_rows("permutation", tokens * choices)
    return RoutedCall(
        x.contiguous(),
        weight.contiguous(),
        w_in.contiguous(),
        None if b_in is None else b_in.contiguous(),
        w_out.contiguous(),
        None if b_out is None else b_out.contiguous(),
        offsets.contiguous(),
        permutation.contiguous(),
        act,
    )


def check_rows(name: str, rows: int) -> None:
    if rows > _MOST_ROWS:
        raise ValueError(f"{name}: expected up to 2^30 rows N * K, got {rows}")
