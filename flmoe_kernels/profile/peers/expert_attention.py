"""expert_attention: the attention of one fusion layer in a training step, all experts, views and samples.

Peers get the layout that suits them: rows padded to the longest with a mask of keys, as the published layer
holds them, or, since all samples of the named shapes have the same number of valid tokens, no padding at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.ops.expert_attention.api import expert_attention
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Outputs, Prepared, prepare_function
from flmoe_kernels.profile.shapes import LayerShape

from . import common

PADDED, DENSE = "reference+sdpa", "unpadded sdpa"
ORACLE = REFERENCE
PEERS = (REFERENCE, PADDED, DENSE)
# Results that only contestants with the package's own generator of dropout have.
WITH_DROPOUT = " with dropout"
_SEED = 2**61 + 12345


def lack(case: Case, name: str) -> str:
    return ""


def version(name: str) -> str:
    return torch.__version__


def shape_of(case: Case) -> LayerShape:
    assert isinstance(case.shape, LayerShape)
    return case.shape


def rate_of(case: Case) -> float:
    return shape_of(case).dropout if case.variant == "dropout" else 0.0


def problems(shape: LayerShape) -> int:
    """Runs of rows of one expert: views of samples."""
    return shape.views * shape.batch


def make_inputs(shape: LayerShape, device: str) -> dict[str, Tensor]:
    """q, k, v (E, views * samples * valid tokens, H, d): packed, without padding."""
    generator = common.generator_of(device)
    rows = problems(shape) * shape.valid_tokens
    size = (shape.fusion_models, rows, shape.heads, shape.dim // shape.heads)
    return {name: common.draw(*size, generator=generator) for name in ("q", "k", "v")}


def packed(case: Case, backend: str, rate: float) -> Callable[..., Tensor]:
    shape = shape_of(case)
    bounds = torch.arange(problems(shape) + 1, dtype=torch.int32) * shape.valid_tokens
    cu_seqlens = bounds.to(case.device)
    seed = torch.tensor(_SEED, device=case.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = expert_attention(
            q, k, v, cu_seqlens, dropout_p=rate, seed=seed, backend=backend, return_lse=False
        )
        assert isinstance(out, Tensor)
        return out

    return call


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    inputs = make_inputs(shape_of(case), case.device)
    leaves = {key: common.place(case, x, dtype) for key, x in inputs.items()}
    if name in (PADDED, DENSE):
        return _prepare_sdpa(case, name, leaves)
    rate = rate_of(case)
    timed = _ready(packed(case, name, rate), leaves, case.phase)
    if not rate:
        return timed
    plain = _outputs_of(packed(case, name, 0.0), leaves, case.phase)

    def outputs() -> Outputs:
        # The generator of dropout is the package's own: with one seed every backend drops the same.
        dropped = {key + WITH_DROPOUT: x for key, x in timed.outputs().items()}
        return plain() | dropped

    return Prepared(timed.call, outputs)


def _ready(attend: Callable[..., Tensor], leaves: dict[str, Tensor], phase: str) -> Prepared:
    """Of a function whose result has the form of q."""
    through = {"out": (leaves["q"].shape, leaves["q"].dtype)}
    return prepare_function(lambda q, k, v: {"out": attend(q, k, v)}, leaves, phase, through)


def _prepare_sdpa(case: Case, name: str, leaves: dict[str, Tensor]) -> Prepared:
    """Timed on tensors in the layout of scaled_dot_product_attention; compared from and to packed rows."""
    shape = shape_of(case)
    mask = None if name == DENSE else _key_mask(shape).to(case.device)
    heads = {key: _to_heads(shape, x, mask) for key, x in leaves.items()}
    rate = rate_of(case)

    def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        keys = None if mask is None else mask[None, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=p)

    def checked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (_to_heads(shape, x, mask) for x in (q, k, v))
        return _to_rows(shape, attend(query, key, value, 0.0), mask)

    ready = _ready(functools.partial(attend, p=rate), heads, case.phase)
    return Prepared(ready.call, _outputs_of(checked, leaves, case.phase))


def _outputs_of(
    attend: Callable[..., Tensor], leaves: dict[str, Tensor], phase: str
) -> Callable[[], Outputs]:
    """Made only when asked for."""
    return lambda: _ready(attend, leaves, phase).outputs()


def _key_mask(shape: LayerShape) -> Tensor:
    """(L,) bool: which of a sample's tokens are valid; the padding of a modality is at its end."""
    counts = zip(shape.tokens, shape.valid, strict=True)
    return torch.cat([torch.arange(n) < (n if valid is None else valid) for n, valid in counts])


def _to_heads(shape: LayerShape, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Packed rows (E, n, H, d) as (E * problems, H, L, d); L of all tokens where a mask is given."""
    width = rows.shape[-1]
    x = rows.reshape(-1, shape.valid_tokens, shape.heads, width)
    if mask is not None:
        place = mask.nonzero().squeeze(1)
        x = x.new_zeros(len(x), len(mask), shape.heads, width).index_copy(1, place, x)
    return x.transpose(1, 2).contiguous()


def _to_rows(shape: LayerShape, heads: Tensor, mask: Tensor | None) -> Tensor:
    x = heads.transpose(1, 2)
    if mask is not None:
        x = x[:, mask]
    return x.reshape(shape.fusion_models, -1, shape.heads, x.shape[-1])
