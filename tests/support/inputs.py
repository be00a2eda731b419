"""Test inputs: seeded draws, ragged runs, mask patterns, copies in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

MaskMaker = Callable[[int, Sequence[int], torch.Generator], "list[Tensor | None] | None"]


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Standard normal values times scale, the same for all dtypes up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def make_seed(value: int = 2**61 + 987654321) -> Tensor:
    """Seed for dropout; the default has bits in both halves."""
    return torch.tensor(value, dtype=torch.int64)


def cumulative(lengths: Sequence[int], first: int = 0) -> Tensor:
    """Bounds (len + 1,) int32 of runs with these lengths, starting at row `first`."""
    return torch.tensor(list(accumulate(lengths, initial=first)), dtype=torch.int32)


def as_dtype(tree: Any, dtype: torch.dtype, requires_grad: bool = False) -> Any:
    """A detached copy of nested lists and tuples, with floating tensors in another dtype."""
    if isinstance(tree, Tensor):
        copy = tree.detach().clone()
        if copy.dtype.is_floating_point:
            copy = copy.to(dtype).requires_grad_(requires_grad)
        return copy
    if isinstance(tree, list | tuple):
        return type(tree)(as_dtype(each, dtype, requires_grad) for each in tree)
    return tree


NAN, INF = float("nan"), float("inf")
# Rows of four logits on which a softmax has to act as torch's.
SPECIAL_LOGITS = (
    (INF, 0.5, -1.0, 0.0),
    (0.5, INF, INF, 0.0),
    (INF, INF, INF, INF),
    (INF, -200.0, -300.0, -400.0),
    (INF, -INF, 0.0, 1.0),
    (-INF, -INF, -INF, -INF),
    (-INF, 0.0, 1.0, -INF),
    (0.0, NAN, 1.0, 2.0),
    (NAN, INF, 0.0, 1.0),
    (0.0, 1.0, INF, NAN),
    (0.0, -200.0, 1.0, 0.5),
)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Input gradients of the outputs' inner product with seeded normal values; zeros if there is no gradient."""
    cotangents = {
        # Values that all dtypes represent exactly, so that results in different dtypes can be compared.
        out: draw(*out.shape, dtype=torch.bfloat16, seed=7 + i).to(out.dtype)
        for i, out in enumerate(outputs)
        if out.requires_grad
    }
    if not cotangents:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        list(cotangents), inputs, list(cotangents.values()), allow_unused=True
    )
    return [
        torch.zeros_like(x) if grad is None else grad for grad, x in zip(found, inputs, strict=True)
    ]


def draw_masks(
    pattern: str, batch: int, lengths: Sequence[int], seed: int = 0
) -> list[Tensor | None] | None:
    """Masks (batch, L_m), True = valid, with a pattern from MASK_PATTERNS."""
    return MASK_PATTERNS[pattern](batch, lengths, torch.Generator().manual_seed(seed))


def draw_replacements(inputs: Sequence[Tensor], experts: int) -> list[list[Tensor]]:
    """Noise for every expert and modality, with the shapes and dtypes of the inputs."""
    return [
        [draw(*x.shape, dtype=x.dtype, seed=99 + e * len(inputs) + m) for m, x in enumerate(inputs)]
        for e in range(experts)
    ]


def _partial(batch: int, lengths: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """A mask with padding of random length at the end and holes; at least one token is valid."""
    masks = []
    for length in lengths:
        kept = torch.randint(1, length + 1, (batch, 1), generator=generator)
        mask = torch.arange(length) < kept
        mask &= torch.rand((batch, length), generator=generator) < 0.8
        mask[:, 0] = True
        masks.append(mask)
    return masks


def _padded_sample(
    batch: int, lengths: Sequence[int], generator: torch.Generator
) -> list[Tensor | None]:
    masks = _partial(batch, lengths, generator)
    for mask in masks:
        mask[batch // 2] = False
    return [*masks]


def _padded_modality(
    batch: int, lengths: Sequence[int], generator: torch.Generator
) -> list[Tensor | None]:
    masks = _partial(batch, lengths, generator)
    masks[-1][:] = False
    masks[0][0, 1:] = True
    return [*masks]


def _mixed(batch: int, lengths: Sequence[int], generator: torch.Generator) -> list[Tensor | None]:
    return [mask if m % 2 else None for m, mask in enumerate(_partial(batch, lengths, generator))]


def _numbers(batch: int, lengths: Sequence[int], generator: torch.Generator) -> list[Tensor | None]:
    masks = _partial(batch, lengths, generator)
    dtypes = (torch.float32, torch.int64, torch.uint8)
    return [mask.to(dtypes[m % len(dtypes)]) for m, mask in enumerate(masks)]


MASK_PATTERNS: dict[str, MaskMaker] = {
    "none": lambda batch, lengths, generator: None,
    "all_none": lambda batch, lengths, generator: [None] * len(lengths),
    "all_valid": lambda batch, lengths, generator: [
        torch.ones((batch, length), dtype=torch.bool) for length in lengths
    ],
    "partial": lambda batch, lengths, generator: [*_partial(batch, lengths, generator)],
    "padded_sample": _padded_sample,
    "padded_modality": _padded_modality,
    "mixed": _mixed,
    "numbers": _numbers,
}
