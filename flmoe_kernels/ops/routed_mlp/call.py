"""Validated arguments of the routed MLP, passed to all backends."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.operands import expect, experts_contiguous

# Positions are int32, and the kernels also compute slightly larger positions in int32.
_MOST_ROWS = 2**30


@dataclass(frozen=True)
class RoutedCall:
    """Inputs of the routed MLP.

    x (N, D), weight (N, K), w_in (E, F, D), b_in (E, F), w_out (E, D, F), b_out (E, D), w_gate (E, F, D) and
    b_gate (E, F) have one dtype; w_gate and b_gate are None for experts without a gate. offsets (E + 1) and
    permutation (N * K) are those of `dispatch`, int32; act is a position in ACTIVATIONS.
    """

    x: Tensor
    weight: Tensor
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    offsets: Tensor
    permutation: Tensor
    act: int

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs with a gradient."""
        of_gate = (self.w_gate, self.b_gate)
        return self.x, self.weight, self.w_in, self.b_in, self.w_out, self.b_out, *of_gate

    @property
    def gated(self) -> bool:
        return self.w_gate is not None

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

    @property
    def layers_shape(self) -> tuple[int, ...]:
        """Shape of the hidden layer before activation: (N * K, F), gated (2, N * K, F) for w_in and w_gate."""
        return (2, self.rows, self.hidden) if self.gated else (self.rows, self.hidden)

    def checked(self) -> RoutedCall:
        """Check the call; return it with tensors in the layout that the kernels read. ValueError if it is invalid.

        All tensors are contiguous, except that the experts of w_in and w_gate may have any stride.
        """
        experts, hidden, width = self.w_in.shape
        tokens, choices = self.weight.shape
        dtype, device = self.x.dtype, self.x.device
        expect("x", self.x, (tokens, width), dtype, device)
        expect("weight", self.weight, (tokens, choices), dtype, device)
        expect("w_in", self.w_in, (experts, hidden, width), dtype, device)
        expect("b_in", self.b_in, (experts, hidden), dtype, device)
        expect("w_out", self.w_out, (experts, width, hidden), dtype, device)
        expect("b_out", self.b_out, (experts, width), dtype, device)
        expect("w_gate", self.w_gate, (experts, hidden, width), dtype, device)
        expect("b_gate", self.b_gate, (experts, hidden), dtype, device)
        expect("offsets", self.offsets, (experts + 1,), torch.int32, device)
        expect("permutation", self.permutation, (tokens * choices,), torch.int32, device)
        if self.rows > _MOST_ROWS:
            raise ValueError(f"permutation: expected up to 2^30 rows N * K, got {self.rows}")
        if self.w_gate is None and self.b_gate is not None:
            raise ValueError("b_gate: expected None without w_gate, got a Tensor")
        given = (*self.differentiable, self.offsets, self.permutation)
        if all(x is None or x.is_contiguous() for x in given):
            return self
        tensors: dict[str, Any] = {}
        for name in (field.name for field in fields(self)[:-1]):
            copy = experts_contiguous if name in ("w_in", "w_gate") else Tensor.contiguous
            tensors[name] = None if getattr(self, name) is None else copy(getattr(self, name))
        return replace(self, **tensors)

    def checked_gradients(self, grad_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Check grad_out (N, D) and hidden (layers_shape) for the backward and return them contiguous."""
        expect("grad_out", grad_out, self.x.shape, self.x.dtype, self.x.device)
        expect("hidden", hidden, self.layers_shape, self.x.dtype, self.x.device)
        return grad_out.contiguous(), hidden.contiguous()
