"""Batched forward of all experts and views over packed rows.

Rows are (expert, view, token): padded tokens are not stored, matrix products run once per stage for all
experts, and the first layer's norm and projection process each token twice per expert (original, noise)
instead of once per view. Each stage reads what the previous stage wrote; attention maps and dropout masks
are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import dropout as rng
from flmoe_kernels.layers.kept import kept
from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.ops.encoder import api as ops
from flmoe_kernels.ops.encoder.layers import seeds_of
from flmoe_kernels.ops.expert_attention.api import expert_attention_packed

from .fusion import Compat, sinusoidal_positions
from .packing import TokenPlan, Views, fold_views, plan_tokens
from .reference import Replacements
from .sparse import (
    GateLosses,
    RoutedWeights,
    called_update,
    routed_update,
    rows_by_modality,
    stack_routed,
)

DenseWeights = tuple[Tensor, Tensor, Tensor, Tensor]  # w_in, b_in, w_out, b_out


@dataclass(frozen=True)
class LayerWeights:
    """One encoder layer of all experts: weights stacked over experts, dropout rates."""

    norm1: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    qkv: Tensor
    proj: tuple[Tensor, Tensor]
    mlp: DenseWeights | RoutedWeights | RoutedMLP
    heads: int
    eps: float
    attention_p: float
    branch_p: float  # on the attention branch, see branch_rate
    mlp_p: float  # 0 in a routed MLP, which has no dropout
    output_p: float


def require_like(parameters: Iterable[Tensor], like: Tensor) -> None:
    """Check dtype and device, because torch.stack and torch.cat promote dtypes and accept meta tensors."""
    for parameter in parameters:
        if parameter.dtype is not like.dtype or parameter.device != like.device:
            raise TypeError(
                f"parameters: expected {like.dtype} on {like.device}, got {parameter.dtype} on {parameter.device}"
            )


def rate_of(name: str, dropouts: Sequence[Any]) -> float:
    """The rate of one dropout, which must be the same in all experts; 0 for a part in eval mode."""
    rates = {drop.p if drop.training else 0.0 for drop in dropouts}
    if len(rates) > 1:
        raise UnsupportedLayer(
            f"interaction_experts: rate or mode of {name} differs between the experts, {sorted(rates)}; "
            "the kernels need the same rate in all experts, backend='reference' does not"
        )
    return rates.pop()


def branch_rate(projections: Sequence[Any], residuals: Sequence[Any], compat: Compat) -> float:
    """The rate of the merged dropouts after the projection and before the residual: keep rates multiply.

    I2MoE adds the branch to itself between the two, so there they stay separate and must have the same rate.
    """
    projection, residual = rate_of("proj_drop", projections), rate_of("dropout1", residuals)
    if compat == "fl_i2moe":
        return 1.0 - (1.0 - projection) * (1.0 - residual)
    if projection != residual:
        raise ValueError(
            f"dropout1: expected the rate of proj_drop, {projection}, got {residual}; with the residual "
            "of I2MoE the kernels need equal rates, backend='reference' does not"
        )
    return projection


def stack_layer(
    layers: Sequence[Any], compat: Compat, dtype: torch.dtype, *, called: bool = False
) -> LayerWeights:
    """Weights of one layer index, stacked over experts, in `dtype`. Gradients flow back to every parameter.

    called: a routed MLP, of a single expert, is called instead.
    """

    like = layers[0].norm1.weight

    def stacked(get: Callable[[Any], Tensor]) -> Tensor:
        parameters = [get(layer) for layer in layers]
        require_like(parameters, like)
        # A single one needs no copy.
        stack = torch.stack(parameters) if len(parameters) > 1 else parameters[0].unsqueeze(0)
        return stack.to(dtype)

    def affine(get: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
        return stacked(lambda x: get(x).weight), stacked(lambda x: get(x).bias)

    first = layers[0]
    width = like.shape[0]
    parts = [w for x in layers for w in (x.attn.q.weight, x.attn.kv.weight)]
    require_like(parts, like)
    tracing = torch._C._get_tracing_state() is not None  # shapes are tensors then
    for name, weights, rows in (("q", parts[::2], width), ("kv", parts[1::2], 2 * width)):
        if not tracing and any(weight.shape[0] != rows for weight in weights):
            raise ValueError(f"attn.{name}.weight: expected {rows} rows in all experts")
    mlps = [x.mlp for x in layers]
    mlp: DenseWeights | RoutedWeights | RoutedMLP
    if isinstance(first.mlp, RoutedMLP):
        if not called:
            require_like([p for mlp in mlps for p in mlp.experts.parameters()], like)
        mlp, mlp_p = first.mlp if called else stack_routed(mlps, dtype), 0.0
    else:
        mlp = (*affine(lambda x: x.mlp.network[0]), *affine(lambda x: x.mlp.network[3]))
        mlp_p = rate_of("mlp.network.2", [each.network[2] for each in mlps])
    return LayerWeights(
        norm1=affine(lambda x: x.norm1),
        norm2=affine(lambda x: x.norm2),
        qkv=torch.cat(parts).to(dtype).view(len(layers), 3 * width, width),
        proj=affine(lambda x: x.attn.proj),
        mlp=mlp,
        heads=first.attn.num_heads,
        eps=first.norm1.eps,
        attention_p=rate_of("attn_drop", [x.attn.attn_drop for x in layers]),
        branch_p=branch_rate(
            [x.attn.proj_drop for x in layers], [x.dropout1 for x in layers], compat
        ),
        mlp_p=mlp_p,
        output_p=rate_of("dropout2", [x.dropout2 for x in layers]),
    )


def pack_inputs(
    inputs: Sequence[Tensor], masks: Sequence[Tensor | None] | None, backend: str
) -> tuple[TokenPlan, Tensor]:
    """Return the plan of the rows, and the tokens (B, L, D) of all modalities."""
    first, lengths = inputs[0], [x.shape[1] for x in inputs]
    # Triton's interpreter uses the same plan as a GPU.
    plan = plan_tokens(
        first.shape[0], lengths, masks, first.device, reads=backend != backends.TRITON
    )
    return plan, torch.cat(list(inputs), dim=1)


def embed(
    tokens: Tensor,
    plan: TokenPlan,
    positions: Tensor | None,
    experts: int,
    replacements: Tensor | Literal["noise"] | None = None,
) -> Tensor:
    """Rows before the first layer, (E, 2, n, D): the tokens and their replacements; (E, 1, n, D) without views.

    tokens: (B, L, D), the modalities one after another. positions: learned positions (E, L, D), or None for
    sinusoidal positions. replacements: (E, B, L, D) or (B, L, D), "noise" for N(0, 1), None without views.
    """
    batch, length, width = tokens.shape
    # Rows as (B, L) if none are left out: then a position's gradient is a plain sum over the samples.
    shape = (batch, length) if plan.index is None else (plan.rows,)
    place = positions
    if place is None:
        place = position_table(length, width, tokens.device, tokens.dtype)
    if plan.index is not None:
        place = place.index_select(-2, plan.position)
    elif positions is not None:
        place = place.unsqueeze(1)
    rows = (plan.pack(tokens).view(*shape, width) + place).expand(experts, *shape, width)
    if replacements is None:
        return rows.reshape(experts, 1, plan.rows, width)
    if isinstance(replacements, Tensor):
        packed = plan.pack(replacements)
        noise = packed.view(*packed.shape[:-2], *shape, width)
    else:
        noise = torch.randn((experts, *shape, width), dtype=tokens.dtype, device=tokens.device)
    return torch.stack([rows, (noise + place).expand_as(rows)], dim=1).flatten(2, -2)


position_table = kept(sinusoidal_positions)


def stack_replacements(replacements: Replacements) -> Tensor:
    """The tokens that replace all modalities: (E, B, L, D), or (B, L, D) if all experts share them."""
    first = replacements[0]
    if all(x is y for each in replacements for x, y in zip(each, first, strict=True)):
        return torch.cat(list(first), dim=1)
    return torch.stack([torch.cat(list(each), dim=1) for each in replacements])


def draw_seeds(rates: Sequence[float], device: torch.device) -> Tensor | None:
    """A seed for every dropout, all drawn in one call; None if no dropout is active: then torch's generator is not
    used."""
    if not any(rng.keep_threshold(p) < rng.DRAWS for p in rates):
        return None
    return torch.randint(0, 2**63 - 1, (len(rates),), dtype=torch.int64, device=device)


def encode(
    rows: Tensor,
    layers: Sequence[LayerWeights],
    plan: TokenPlan,
    views: Views,
    compat: Compat,
    backend: str,
) -> tuple[Tensor, list[GateLosses]]:
    """Compute latents (E, V, B, M * D) from rows (E, 2, n, D) with views or (E, 1, n, D) without, and gate losses
    [E][V] of every sparse layer. If `views.folded`, a view that does not exist has latent 0."""
    experts, copies, n, width = rows.shape
    shape = (experts, views.count, plan.samples, plan.modalities * width)
    rates = [p for x in layers for p in (x.attention_p, x.branch_p, x.mlp_p, x.output_p)]
    seeds = iter(seeds_of(draw_seeds(rates, rows.device), rates))
    sparse = any(isinstance(layer.mlp, RoutedWeights) for layer in layers)
    groups = rows_by_modality(plan) if sparse else None
    gathered: list[GateLosses] = []
    first = layers[0]
    rows = rows.contiguous()
    flat = rows.view(experts, copies * n, width)
    normed = ops.expert_norm(flat, *first.norm1, first.eps, backend)
    qkv = ops.expert_linear(normed, first.qkv, None, backend)
    stream: Tensor | None = flat if compat == "fl_i2moe" else None
    count = 1
    if views.folded:
        plan, places = fold_views(plan, views)
        index = places + copies * n * torch.arange(experts, device=places.device).unsqueeze(1)
        n = plan.rows
        # An embedding, because the backward of index_select is slow on a CPU.
        qkv = F.embedding(index, qkv.reshape(-1, 3 * width))
        stream = None if stream is None else F.embedding(index, stream.reshape(-1, width))
    elif copies > 1:
        count, places = views.count, views.places(plan)
        qkv = ops.expand_views(qkv.view(experts, 2, n, 3 * width), places, count, backend)
        if stream is not None:
            stream = ops.expand_views(rows, places, count, backend).flatten(1, 2)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        attended, _ = expert_attention_packed(
            qkv.view(experts * count, n, 3, layer.heads, width // layer.heads),
            plan.cu_samples,
            next(seeds),
            layer.attention_p,
            (width // layer.heads) ** -0.5,
            backend,
        )
        branch = ops.expert_linear(attended.view(experts, count * n, width), *layer.proj, backend)
        residual = stream if compat == "fl_i2moe" else None
        seed = next(seeds)
        stream, normed = ops.dropout_add_norm(
            residual, branch, *layer.norm2, seed, layer.branch_p, layer.eps, backend
        )
        seed = next(seeds)
        if isinstance(layer.mlp, RoutedWeights):
            assert groups is not None
            update, losses = routed_update(normed, layer.mlp, groups, count, backend)
            gathered.append(losses)
        elif isinstance(layer.mlp, RoutedMLP):
            update = called_update(normed, layer.mlp, plan)
        else:
            update = ops.expert_mlp(normed, *layer.mlp, seed, layer.mlp_p, backend)
        seed = next(seeds)
        if following is None:
            latent = ops.dropout_add_pool(
                stream, update, plan.cu_segments, count, seed, layer.output_p, backend
            )
            return latent.view(shape), gathered
        stream, normed = ops.dropout_add_norm(
            stream, update, *following.norm1, seed, layer.output_p, layer.eps, backend
        )
        qkv = ops.expert_linear(normed, following.qkv, None, backend)
    raise AssertionError("a layer without encoder layers is refused at construction")
