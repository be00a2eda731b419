"""expert_attention: attention of a fusion layer in a training step."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from flmoe_kernels.ops.expert_attention.api import expert_attention
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Outputs, Prepared, prepare_function
from flmoe_kernels.profile.shapes import LayerShape

from . import draws

# Results that only contestants with this package's dropout generator have.
WITH_DROPOUT = " with dropout"
_SEED = 2**61 + 12345


def shape_of(case: Case) -> LayerShape:
    assert isinstance(case.shape, LayerShape)
    return case.shape


def rate_of(case: Case) -> float:
    return shape_of(case).dropout if case.variant == "dropout" else 0.0


def make_leaves(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make q, k, v (E, views * valid tokens of all samples, H, d): packed, without padding."""
    shape = shape_of(case)
    generator = draws.generator_of(case.device)
    rows = shape.views * sum(shape.valid_tokens)
    size = (shape.fusion_models, rows, shape.heads, shape.dim // shape.heads)
    return {
        name: draws.place(case, draws.draw(*size, generator=generator), dtype)
        for name in ("q", "k", "v")
    }


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    leaves = make_leaves(case, dtype)
    rate = rate_of(case)
    timed = ready(_packed(case, name, rate), leaves, case.phase)
    if not rate:
        return timed

    def outputs() -> Outputs:
        plain = ready(_packed(case, name, 0.0), leaves, case.phase).outputs()
        # The dropout generator is this package's: with the same seed every backend drops the same values.
        return plain | {key + WITH_DROPOUT: x for key, x in timed.outputs().items()}

    return Prepared(timed.call, outputs)


def _packed(case: Case, backend: str, rate: float) -> Callable[..., Tensor]:
    shape = shape_of(case)
    bounds = itertools.accumulate(shape.valid_tokens * shape.views, initial=0)
    cu_seqlens = torch.tensor(list(bounds), dtype=torch.int32, device=case.device)
    seed = torch.tensor(_SEED, device=case.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = expert_attention(
            q, k, v, cu_seqlens, dropout_p=rate, seed=seed, backend=backend, return_lse=False
        )
        assert isinstance(out, Tensor)
        return out

    return call


def ready(attend: Callable[..., Tensor], leaves: dict[str, Tensor], phase: str) -> Prepared:
    """Prepare a function whose result has the shape and dtype of q."""
    through = {"out": (leaves["q"].shape, leaves["q"].dtype)}
    return prepare_function(lambda q, k, v: {"out": attend(q, k, v)}, leaves, phase, through)
