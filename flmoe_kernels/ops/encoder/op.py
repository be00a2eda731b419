"""torch.library registration of the encoder's operators: backends, schemas, fakes, autograd.

Shapes are those of api.py. A gradient that is not requested is returned as an empty tensor. The reference is not
registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.core.flops import no_products, values_of
from flmoe_kernels.core.registration import Derivative, define, first_order_only

from .inference import FIRST_BIAS, LAYER_TENSORS
from .wants import rows_wanted

_OPS = torch.ops.flmoe
_DROP = "Tensor? seed, float p"


def _kernels(backend: str) -> Any:
    """The backend's module with linear, norm, mlp, pool, views_of and their backward functions."""
    match backend:
        case "cpu":
            from . import cpu

            return cpu
        case "triton":
            from . import triton

            return triton
        case _:
            raise ValueError(f"backend: expected cpu or triton, got {backend!r}")


def _run(function: str) -> Callable[..., Any]:
    return lambda backend, *args: getattr(_kernels(backend), function)(*args)


def _like(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,))


# ---- expert_linear ----


def _linear_backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = x.new_empty(weight.shape[:2] if want_bias else (0,))
    return _like(x, want_x), _like(weight, want_weight), bias


def _linear_flops(x: Tensor, weight: Tensor, _bias: Tensor | None) -> int:
    return 2 * x.numel() * weight.shape[1]


def _linear_backward_flops(
    _grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, _want_bias: bool
) -> int:
    return (want_x + want_weight) * _linear_flops(x, weight, None)


define(
    "expert_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _run("linear"),
    lambda x, weight, bias: x.new_empty((*x.shape[:2], weight.shape[1])),
    Derivative(
        3,
        lambda x, weight, *_: ((x, weight), ()),
        lambda *saved: _OPS.expert_linear_backward(*saved[:3], *saved[3], saved[4]),
    ),
    flops=_linear_flops,
)
define(
    "expert_linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, bool want_x, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _run("linear_backward"),
    _linear_backward_fake,
    flops=_linear_backward_flops,
)


# ---- expert_norm and dropout_add_norm: two operators, one kernel ----


def _expert_norm(
    backend: str, x: Tensor, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return _kernels(backend).norm(x, None, gain, shift, None, 0.0, eps)[1:]


def _norm_fake(x: Tensor, has_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[:2], dtype=statistics_dtype(x.dtype))
    return _like(x, has_sum), _like(x), stats, torch.empty_like(stats)


def _norm_backward_fake(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    seed: Tensor | None,
    p: float,
    self_residual: bool,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    rows = rows_wanted(seed, self_residual, wants)
    return *(_like(total, want) for want in rows), *(_like(gain, want) for want in wants[2:])


def _add_norm_saved(
    residual: Tensor | None, _update: Tensor, gain: Tensor, _shift: Tensor, *rest: Any
) -> tuple[tuple, tuple]:
    seed, p, _eps, total, _normed, mean, rstd = rest
    return (total, mean, rstd, gain, seed), (p, residual is None)


def _expert_norm_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    *tensors, (want_x, *affine), backend = saved
    tail = (None, 0.0, False, [want_x, False, *affine], backend)
    grad_x, _, gain, shift = _OPS.dropout_add_norm_backward(None, grad, *tensors, *tail)
    return grad_x, gain, shift


def _add_norm_backward(*saved: Any) -> tuple[Tensor, ...]:
    *_, seed, _p, self_residual, _wants, _backend = saved
    residual, update, *affine = _OPS.dropout_add_norm_backward(*saved)
    return residual, residual if seed is None and not self_residual else update, *affine


define(
    "expert_norm",
    "(Tensor x, Tensor gain, Tensor shift, float eps) -> (Tensor, Tensor, Tensor)",
    _expert_norm,
    lambda x, gain, shift, eps: _norm_fake(x, False)[1:],
    Derivative(
        3,
        lambda x, gain, shift, eps, normed, mean, rstd: ((x.contiguous(), mean, rstd, gain), ()),
        _expert_norm_backward,
    ),
    flops=no_products,
)
define(
    "dropout_add_norm",
    f"(Tensor? residual, Tensor update, Tensor gain, Tensor shift, {_DROP}, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run("norm"),
    lambda residual, update, *rest: _norm_fake(update, True),
    Derivative(4, _add_norm_saved, _add_norm_backward, results=2),
    flops=no_products,
)
define(
    "dropout_add_norm_backward",
    "(Tensor? grad_total, Tensor? grad_normed, Tensor total, Tensor mean, Tensor rstd, "
    f"Tensor gain, {_DROP}, bool self_residual, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run("norm_backward"),
    _norm_backward_fake,
    flops=no_products,
)


# ---- expert_mlp ----


def _mlp_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    hidden: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    seed: Tensor | None,
    p: float,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    like = (x, w_in, w_in[:, :, 0], w_out, w_out[:, :, 0])
    return tuple(map(_like, like, wants))


def _mlp_flops(x: Tensor, w_in: Tensor, _b_in: Tensor, w_out: Tensor, *_rest: Any) -> int:
    return _linear_flops(x, w_in, None) + 2 * x.shape[1] * w_out.numel()


def _mlp_backward_flops(
    _grad: Tensor,
    x: Tensor,
    _hidden: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    _seed: Tensor | None,
    _p: float,
    wants: Sequence[bool],
) -> int:
    want_x, want_in, _, want_out, _ = wants
    through_w_out = 2 * x.shape[1] * w_out.numel()
    return (want_x + want_in) * _linear_flops(x, w_in, None) + (1 + want_out) * through_w_out


define(
    "expert_mlp",
    f"(Tensor x, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, {_DROP}) -> (Tensor, Tensor)",
    _run("mlp"),
    lambda x, w_in, b_in, w_out, *rest: tuple(
        x.new_empty((*x.shape[:2], weight.shape[1])) for weight in (w_out, w_in)
    ),
    Derivative(
        5,
        lambda x, w_in, _b_in, w_out, _b_out, seed, p, _out, hidden: (
            (x, hidden, w_in, w_out, seed),
            (p,),
        ),
    ),
    flops=_mlp_flops,
)
define(
    "expert_mlp_backward",
    "(Tensor grad_out, Tensor x, Tensor hidden, Tensor w_in, Tensor w_out, "
    f"{_DROP}, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run("mlp_backward"),
    _mlp_backward_fake,
    flops=_mlp_backward_flops,
)


# ---- dropout_add_pool ----


def _pool_fake(
    residual: Tensor, update: Tensor, cu_segments: Tensor, views: int, *_rest: Any
) -> Tensor:
    experts, _, width = residual.shape
    return residual.new_empty((experts, views, cu_segments.shape[0] - 1, width))


def _pool_backward_fake(
    grad_out: Tensor,
    cu_segments: Tensor,
    views: int,
    rows: int,
    seed: Tensor | None,
    p: float,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    shape = (grad_out.shape[0], rows, grad_out.shape[3])
    wanted = rows_wanted(seed, False, wants)
    return tuple(grad_out.new_empty(shape if want else (0,)) for want in wanted)


def _pool_backward(
    grad: Tensor, cu_segments: Tensor, seed: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    views, rows, *tail = rest
    residual, update = _OPS.dropout_add_pool_backward(grad, cu_segments, views, rows, seed, *tail)
    return residual, residual if seed is None else update


define(
    "dropout_add_pool",
    f"(Tensor residual, Tensor update, Tensor cu_segments, SymInt views, {_DROP}) -> Tensor",
    _run("pool"),
    _pool_fake,
    Derivative(
        2,
        lambda residual, _update, cu_segments, views, seed, p, _out: (
            (cu_segments, seed),
            (views, residual.shape[1], p),
        ),
        _pool_backward,
    ),
    flops=no_products,
)
define(
    "dropout_add_pool_backward",
    f"(Tensor grad_out, Tensor cu_segments, SymInt views, SymInt rows, {_DROP}, bool[] wants) "
    "-> (Tensor, Tensor)",
    _run("pool_backward"),
    _pool_backward_fake,
    flops=no_products,
)


# ---- expand_views ----


define(
    "expand_views",
    "(Tensor x, Tensor modality, SymInt views) -> Tensor",
    _run("views_of"),
    lambda x, modality, views: x.new_empty((x.shape[0], views, *x.shape[2:])),
    Derivative(1, lambda _x, modality, *_: ((modality,), ())),
    flops=no_products,
)
define(
    "expand_views_backward",
    "(Tensor grad_out, Tensor modality) -> Tensor",
    _run("views_backward"),
    lambda grad, modality: grad.new_empty((grad.shape[0], 2, *grad.shape[2:])),
    flops=no_products,
)


# ---- encoder_inference ----


def _inference_flops(
    rows: Tensor,
    _index: Tensor | None,
    cu_samples: Tensor,
    cu_segments: Tensor,
    weights: Sequence[Tensor],
    experts: int,
    *_rest: Any,
) -> int:
    """The second product of the last MLP processes one row for each segment."""
    bounds, width = values_of(cu_samples), rows.shape[2]
    hidden = weights[FIRST_BIAS].shape[0]
    layers = len(weights) // (experts * LAYER_TENSORS)
    if bounds is None:
        count, samples = rows.shape[1], torch.sym_max(cu_samples.shape[0] - 1, 1)
        pairs = count * count // samples
    else:
        count, pairs = bounds[-1], sum((end - start) ** 2 for start, end in pairwise(bounds))
    layer = 4 * pairs * width + count * (8 * width * width + 4 * width * hidden)
    return experts * (layers * layer - 2 * (count - cu_segments.shape[0] + 1) * width * hidden)


define(
    "encoder_inference",
    "(Tensor rows, Tensor? index, Tensor cu_samples, Tensor cu_segments, Tensor[] weights, "
    "SymInt experts, SymInt heads, float eps, bool self_residual) -> Tensor",
    _run("inference"),
    lambda rows, index, cu_samples, cu_segments, weights, experts, *rest: rows.new_empty(
        (experts, cu_segments.shape[0] - 1, rows.shape[2])
    ),
    flops=_inference_flops,
)

first_order_only("encoder_inference")
