"""Seeded inputs, the same for every contestant."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flmoe_kernels.core.triton.target import assumed
from flmoe_kernels.profile.cases import Case

# More than the range of normal draws.
_CHOSEN = 20.0


def generator_of(device: str) -> torch.Generator:
    """Make a seeded generator on the device, so that a GPU does not wait for the host."""
    return torch.Generator(device).manual_seed(1)


def draw(*size: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Draw normal values in float32 on the generator's device; any values if nothing is computed with them."""
    if assumed() is not None:
        return torch.empty(size, device=generator.device)
    return torch.randn(*size, generator=generator, device=generator.device) * scale


def draw_logits(
    tokens: int,
    experts: int,
    choices: int,
    load: Literal["uniform", "zipf"],
    generator: torch.Generator,
) -> Tensor:
    """Draw logits (N, E) in float32 whose top `choices` experts per token follow the distribution `load`.

    "uniform": all experts are equally probable. "zipf": see `zipf_probabilities`; the ranks of the experts are
    drawn, too.
    """
    logits, device = draw(tokens, experts, generator=generator), generator.device
    if load == "uniform":
        return logits
    bounds = zipf_probabilities(experts, choices).cumsum(0).to(device)
    # Systematic sampling (Madow, 1949): points at distance 1 lie in different intervals of length at most 1, so
    # the choices of a token are distinct, and the probability of an interval is its length.
    start = torch.rand(tokens, 1, generator=generator, dtype=bounds.dtype, device=device)
    points = start + torch.arange(choices, device=device)
    ranks = torch.searchsorted(bounds, points, right=True).clamp(max=experts - 1)
    order = torch.randperm(experts, generator=generator, device=device)
    return logits.scatter_add(1, order[ranks], logits.new_full(ranks.shape, _CHOSEN))


def zipf_probabilities(experts: int, choices: int) -> Tensor:
    """Return the probability (E,) in float64 that a token chooses the expert of each rank r, from 1 to E.

    It is proportional to 1/r, Zipf's law with exponent 1, but at most 1, because choices are distinct; the sum is
    `choices`.
    """
    shares = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    for certain in range(choices):
        scale = (choices - certain) / shares[certain:].sum()
        if scale * shares[certain] <= 1:
            break
    return (scale * shares).clamp(max=1)


def place(case: Case, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x to the case's dtype, then move it to the case's device and to `dtype`."""
    return x.to(case.dtype).to(device=case.device, dtype=dtype)
