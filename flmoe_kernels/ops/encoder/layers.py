"""Dense fusion encoders of all experts as one operator, from embedded rows to pooled latents.

On a small batch a call through torch's dispatcher and autograd takes as long as a kernel, so `encoder_layers` and
`encoder_layers_backward` call a backend's kernels directly. The caller passes each parameter as a separate tensor.
`stack` copies them into three buffers (vectors, matrices of D columns, matrices of F columns).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flmoe_kernels.core import dropout as rng

from .inference import FIRST_BIAS, LAYER_TENSORS, layer_shapes
from .steps import NONE, Saved, Stream, Weights, steps_of

RATES = 4  # of a layer: attention, attention branch, MLP, output
SAVED = 12  # tensors of a layer for the backward


# Places of the tensors of Weights among the LAYER_TENSORS of an expert's layer.
PLACES = Weights((0,), (1,), (2, 3), (4,), (5,), (6,), (7,), (8,), (9,), (10,), (11,))
# Tensors with the same number of columns are stacked by one copy.
_VECTORS = ("gain1", "shift1", "proj_bias", "gain2", "shift2", "b_in", "b_out")
_GROUPS = (_VECTORS, ("qkv", "proj", "w_in"), ("w_out",))


class Options(NamedTuple):
    """Arguments of the operators after the tensors."""

    rates: Sequence[float]
    heads: int
    views: int
    eps: float
    self_residual: bool


class Kernels(NamedTuple):
    """Modules of a backend."""

    encoder: Any
    attention: Any


class Rows(NamedTuple):
    """How rows (E, copies, n, D) become the rows of all views, and where samples and segments begin."""

    modality: Tensor | None  # see expand_views
    source: Tensor | None  # or the place of every row among the copies * n rows
    cu_samples: Tensor
    cu_segments: Tensor
    valid_rows: Tensor | None  # one int32: the valid rows of each n, which come first; None: all

    def limits(self, views: int) -> dict[str, Any]:
        """The arguments of kernels on rows of `views` views."""
        return {} if self.valid_rows is None else {"count": self.valid_rows, "views": views}

    def expand(self, kernels: Any, x: Tensor, views: int) -> Tensor:
        """(E, copies, n, width) -> (E, R, width)."""
        experts, _, _, width = x.shape
        if self.source is not None:
            index = self._of_experts(self.source, x)
            return torch.embedding(x.view(-1, width), index)
        if self.modality is not None:
            x = kernels.views_of(x, self.modality, views, *self._counted())
        return x.view(experts, -1, width)

    def reduce(self, kernels: Any, grad: Tensor, like: Tensor, views: int) -> Tensor:
        """The gradient of x (E, copies, n, width) from that of expand(x)."""
        experts, copies, n, _ = like.shape
        width = grad.shape[-1]
        if self.source is not None:
            # The backward of index_select is slow on a CPU.
            index, rows = self._of_experts(self.source, like), experts * copies * n
            grad = torch.ops.aten.embedding_dense_backward(grad, index, rows, -1, False)
        elif self.modality is not None:
            grad = kernels.views_backward(
                grad.view(experts, views, n, width), self.modality, *self._counted()
            )
        return grad.view(experts, copies * n, width)

    def _counted(self) -> tuple[Tensor, ...]:
        return () if self.valid_rows is None else (self.valid_rows,)

    @staticmethod
    def _of_experts(index: Tensor, x: Tensor) -> Tensor:
        experts, copies, n, _ = x.shape
        starts = copies * n * torch.arange(experts, device=index.device)
        return index + starts.unsqueeze(1)


def stack(weights: Sequence[Tensor], experts: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Copy the weights of all experts and layers (in the order of `encoder_inference`, expert after expert) into
    one buffer for each of _GROUPS, in `dtype`."""
    layers = len(weights) // max(experts * LAYER_TENSORS, 1)
    if experts < 1 or layers < 1 or len(weights) != experts * layers * LAYER_TENSORS:
        raise ValueError(
            f"weights: expected {LAYER_TENSORS} for each layer of {experts} experts, got {len(weights)}"
        )
    shapes = layer_shapes(width, weights[FIRST_BIAS].numel()) * (experts * layers)
    if [weight.shape for weight in weights] != shapes:
        i = next(i for i, weight in enumerate(weights) if weight.shape != shapes[i])
        raise ValueError(f"weights[{i}]: expected {shapes[i]}, got {tuple(weights[i].shape)}")
    buffers = [
        torch.cat([weights[i] for i in places]) for places in stacked_places(experts, layers)
    ]
    return [buffer if buffer.dtype is dtype else buffer.to(dtype) for buffer in buffers]


@functools.cache
def stacked_places(experts: int, layers: int) -> list[list[int]]:
    """For each buffer of `stack`, the places of its tensors among the weights."""
    return [
        [
            (expert * layers + layer) * LAYER_TENSORS + place
            for layer in range(layers)
            for name in group
            for expert in range(experts)
            for place in getattr(PLACES, name)
        ]
        for group in _GROUPS
    ]


def layers_of(buffers: Sequence[Tensor], experts: int, width: int, hidden: int) -> list[Weights]:
    """Split the buffers of `stack` into the Weights of each layer, without copying."""
    rows = {"qkv": 3 * width, "w_in": hidden, "b_in": hidden}
    found: list[dict[str, Tensor]] = []
    for group, buffer in zip(_GROUPS, buffers, strict=True):
        sizes = [experts * rows.get(name, width) for name in group]
        layers = buffer.shape[0] // sum(sizes)
        found = found or [{} for _ in range(layers)]
        parts = iter(buffer.split_with_sizes(sizes * layers))
        for layer in found:
            for name in group:
                part = next(parts)
                layer[name] = part.reshape(experts, -1, *part.shape[1:])
    return [Weights(**layer) for layer in found]


def seeds_of(seeds: Tensor | None, rates: Sequence[float]) -> list[Tensor | None]:
    """The seed of each dropout, None where nothing is dropped."""
    values = [None] * len(rates) if seeds is None else seeds.unbind(0)
    return [
        seed if rng.keep_threshold(p) < rng.DRAWS else None
        for seed, p in zip(values, rates, strict=True)
    ]


class Dropouts:
    """Seed and rate of each dropout."""

    def __init__(self, seeds: Tensor | None, rates: Sequence[float]) -> None:
        self._dropouts = list(zip(seeds_of(seeds, rates), rates, strict=True))

    def of(self, layer: int) -> list[tuple[Tensor | None, float]]:
        return self._dropouts[layer * RATES : (layer + 1) * RATES]


def forward(
    kernels: Kernels,
    rows: Tensor,
    plan: Rows,
    buffers: Sequence[Tensor],
    hidden: int,
    seeds: Tensor | None,
    options: Options,
    save: bool,
) -> list[Tensor]:
    """Latents, and `Saved` of all layers without the first rows if `save`; see encoder_layers and stack."""
    experts, copies, n, width = rows.shape
    drop = Dropouts(seeds, options.rates)
    k, heads, views = kernels.encoder, options.heads, options.views
    of_views = plan.limits(views)
    layers = layers_of(buffers, experts, width, hidden)
    steps = steps_of(k, rows, hidden, options.eps, options.self_residual)
    stream = Stream(rows.view(experts, copies * n, width))
    (_, *saved), qkv = steps.qkv(stream, layers[0], plan.limits(copies))
    qkv = plan.expand(k, qkv.view(experts, copies, n, 3 * width), views)
    residual = None if options.self_residual else plan.expand(k, rows, views)
    groups = experts * (1 if plan.source is not None else views)
    for i, w in enumerate(layers):
        of_attention, *of_mlp = drop.of(i)
        qkv = qkv.view(groups, -1, 3, heads, width // heads)
        attended, lse = kernels.attention.forward(
            *qkv.unbind(2), plan.cu_samples, *of_attention, (width // heads) ** -0.5
        )
        kept, stream = steps.mlp(
            residual, attended.view(experts, -1, width), w, of_mlp, of_views, save
        )
        if save:
            saved += [qkv, attended, lse, *kept]
        if i + 1 < len(layers):
            kept, qkv = steps.qkv(stream, layers[i + 1], of_views)
            residual = None if options.self_residual else kept[0]
            if save:
                saved += kept
    latents = k.pool(
        stream.residual, stream.update, plan.cu_segments, groups // experts, *stream.dropout
    )
    return [latents.view(experts, -1, width), *(saved if save else [])]


class Flow(NamedTuple):
    """Which gradients a layer's backward computes: of its input rows, and of the results of its steps."""

    rows: bool
    normed1: bool
    qkv: bool
    branch: bool
    normed2: bool
    update: bool


def flows(rows: bool, wants: Sequence[Weights]) -> Iterator[Flow]:
    """For each layer, first to last: which intermediate gradients the wanted ones depend on."""
    for w in wants:
        normed1 = rows or w.gain1 or w.shift1
        qkv = normed1 or w.qkv
        branch = qkv or w.proj or w.proj_bias
        normed2 = rows or branch or w.gain2 or w.shift2
        update = normed2 or w.w_in or w.b_in or w.w_out or w.b_out
        yield Flow(rows, normed1, qkv, branch, normed2, update)
        rows = update


def backward(
    kernels: Kernels,
    grad: Tensor,
    rows: Tensor,
    plan: Rows,
    seeds: Tensor | None,
    saved: Sequence[Tensor],
    options: Options,
    want_rows: bool,
    wants: Sequence[Weights],
) -> list[Tensor]:
    """Gradients of the rows and of every layer's Weights, in this order; those not wanted are empty.

    Those of Weights have the experts one after another, (E * rows, ...)."""
    experts, copies, n, width = rows.shape
    drop, k = Dropouts(seeds, options.rates), kernels.encoder
    buffers, rest = (
        saved[: len(_GROUPS)],
        [rows.view(experts, copies * n, width), *saved[len(_GROUPS) :]],
    )
    kept = [Saved(*rest[i : i + SAVED]) for i in range(0, len(rest), SAVED)]
    layers = layers_of(buffers, experts, width, kept[0].hidden.shape[-1])
    flow = list(flows(want_rows, wants))
    none = rows.new_empty(0)
    grads = [Weights(*[none] * len(Weights._fields))] * len(layers)
    total_rows = kept[-1].total2.shape[1]
    groups = kept[0].qkv.shape[0]
    grad = grad.view(experts, groups // experts, -1, width)
    last, of_views = len(layers) - 1, plan.limits(options.views)
    steps = steps_of(k, rows, kept[0].hidden.shape[-1], self_residual=options.self_residual)
    seed, p = drop.of(last)[3]
    stops = (flow[last].normed2, flow[last].update)
    stream, update = k.pool_backward(
        grad, plan.cu_segments, groups // experts, total_rows, seed, p, stops
    )
    if seed is None:
        update = stream
    for i in reversed(range(len(layers))):
        w, x, f, to, dropouts = layers[i], kept[i], flow[i], wants[i], drop.of(i)
        if not f.update:
            break
        stream, branch, *mlp = steps.mlp_backward(
            (stream, update),
            x,
            w,
            dropouts[1:],
            (f.rows, f.branch, *to[5:]),
            of_views,
        )
        grads[i] = Weights(*[none] * 5, *mlp)
        if dropouts[1][0] is None and not options.self_residual:
            branch = stream
        if not f.branch:
            break
        attended, proj, bias = k.linear_backward(
            branch,
            x.attended.reshape(experts, -1, width),
            w.proj,
            f.qkv,
            to.proj,
            to.proj_bias,
            **of_views,
        )
        grads[i] = grads[i]._replace(proj=proj, proj_bias=bias)
        if not f.qkv:
            break
        qkv = kernels.attention.empty(x.qkv.shape, x.qkv)
        kernels.attention.backward(
            qkv.unbind(2),
            attended.view(x.attended.shape),
            *x.qkv.unbind(2),
            x.attended,
            x.lse,
            plan.cu_samples,
            *dropouts[0],
            (width // options.heads) ** -0.5,
        )
        through = stream if f.rows and not options.self_residual else None
        qkv = qkv.reshape(experts, -1, 3 * width)
        if i == 0:
            qkv = plan.reduce(k, qkv, rows, options.views)
            if through is not None:
                through = plan.reduce(k, through, rows, options.views)
        below = (flow[i - 1].normed2, flow[i - 1].update) if i > 0 else (want_rows, False)
        before = drop.of(i - 1)[3] if i > 0 else NONE
        stream, update, gain1, shift1, of_qkv = steps.qkv_backward(
            (through, qkv),
            x,
            w,
            before,
            (*below, to.gain1, to.shift1, to.qkv),
            of_views if i > 0 else plan.limits(copies),
        )
        if before[0] is None:
            update = stream
        grads[i] = grads[i]._replace(gain1=gain1, shift1=shift1, qkv=of_qkv)
    of_rows = stream.view(rows.shape) if want_rows else none
    of_weights = (each for layer in grads for each in layer)
    return [of_rows, *(x.flatten(0, 1) if x.dim() > 1 else x for x in of_weights)]
