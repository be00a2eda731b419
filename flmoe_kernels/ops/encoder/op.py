"""torch.library registration of the encoder's operators: schemas, fakes, autograd. Glue only.

Shapes are those of encoder/reference.py. A gradient that nobody wants comes back with no elements. The backend is
the last argument of every operator, so that a gradient is computed by the backend that computed the value.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.backend import CPU
from flmoe_kernels.core.native import first_order_only, statistics_dtype

_OPS = torch.ops.flmoe
_DROP = "Tensor? seed, float p"


def _backend(name: str) -> Any:
    """The module of a backend: linear, norm, gelu, pool, views_of and the backward of each."""
    return importlib.import_module(f".{name}", __package__)


def _norm_alone(backend: Any) -> Callable:
    def norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
        return backend.norm(x, None, gain, shift, None, 0.0, eps)[1:]

    return norm


def _define(
    name: str, schema: str, of_backend: str | Callable[[Any], Callable], fake: Callable
) -> None:
    """Register "(schema, str backend='cpu')" -> results.

    of_backend: the name of the function in a backend's module, or what makes the function from the module.
    """
    arguments, results = schema.split(" -> ")
    torch.library.define(f"flmoe::{name}", f"({arguments[1:-1]}, str backend='{CPU}') -> {results}")
    count = len(getattr(_OPS, name).default._schema.arguments) - 1

    def kernel(*args: Any) -> Any:
        # torch leaves out a trailing argument that is its schema's default.
        backend = _backend(args[count] if len(args) > count else CPU)
        found = getattr(backend, of_backend) if isinstance(of_backend, str) else of_backend(backend)
        return found(*args[:count])

    torch.library.impl(f"flmoe::{name}", ("cpu", "cuda"), kernel)
    torch.library.register_fake(f"flmoe::{name}", lambda *args: fake(*args[:count]))


def _like(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,))


# ---- expert_linear ----

_define(
    "expert_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear",
    lambda x, weight, bias: x.new_empty((*x.shape[:2], weight.shape[1])),
)


def _linear_backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = x.new_empty(weight.shape[:2] if want_bias else (0,))
    return _like(x, want_x), _like(weight, want_weight), bias


_define(
    "expert_linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, bool want_x, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor)",
    "linear_backward",
    _linear_backward_fake,
)


def _linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple:
    wants = ctx.needs_input_grad[:3]
    grads = _OPS.expert_linear_backward(grad, *ctx.saved_tensors, *wants, ctx.backend)
    return *(g if want else None for g, want in zip(grads, wants, strict=True)), None


torch.library.register_autograd(
    "flmoe::expert_linear", _linear_autograd, setup_context=_linear_setup
)


# ---- expert_norm and dropout_add_norm: two doors to one kernel ----


def _norm_fake(x: Tensor, has_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[:2], dtype=statistics_dtype(x.dtype))
    return _like(x, has_sum), _like(x), stats, torch.empty_like(stats)


_define(
    "expert_norm",
    "(Tensor x, Tensor gain, Tensor shift, float eps) -> (Tensor, Tensor, Tensor)",
    _norm_alone,
    lambda x, gain, shift, eps: _norm_fake(x, False)[1:],
)
_define(
    "dropout_add_norm",
    f"(Tensor? residual, Tensor update, Tensor gain, Tensor shift, {_DROP}, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "norm",
    lambda residual, update, *rest: _norm_fake(update, True),
)


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
    want_update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own_update = want_update and (self_residual or seed is not None)
    return _like(total, not self_residual), _like(total, own_update), _like(gain), _like(gain)


_define(
    "dropout_add_norm_backward",
    "(Tensor? grad_total, Tensor? grad_normed, Tensor total, Tensor mean, Tensor rstd, "
    f"Tensor gain, {_DROP}, bool self_residual, bool want_update) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "norm_backward",
    _norm_backward_fake,
)


def _expert_norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gain, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x.contiguous(), mean, rstd, gain)


def _expert_norm_autograd(ctx: Any, grad: Tensor | None, *_stats: None) -> tuple:
    if grad is None:
        return (None,) * 5
    x_grad, _, gain, shift = _OPS.dropout_add_norm_backward(
        None, grad, *ctx.saved_tensors, None, 0.0, False, False, ctx.backend
    )
    return x_grad, gain, shift, None, None


def _add_norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    residual, _, gain, _, seed, ctx.p, _, ctx.backend = inputs
    total, _, mean, rstd = output
    ctx.self_residual = residual is None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, mean, rstd, gain, seed)


def _add_norm_autograd(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, *_stats: None
) -> tuple:
    *saved, seed = ctx.saved_tensors
    residual, update, gain, shift = _OPS.dropout_add_norm_backward(
        grad_total, grad_normed, *saved, seed, ctx.p, ctx.self_residual, True, ctx.backend
    )
    rest = (gain, shift, None, None, None, None)
    if ctx.self_residual:
        return None, update, *rest
    return residual, residual if seed is None else update, *rest


torch.library.register_autograd(
    "flmoe::expert_norm", _expert_norm_autograd, setup_context=_expert_norm_setup
)
torch.library.register_autograd(
    "flmoe::dropout_add_norm", _add_norm_autograd, setup_context=_add_norm_setup
)


# ---- gelu_dropout ----

_define("gelu_dropout", f"(Tensor x, {_DROP}) -> Tensor", "gelu", lambda x, *rest: _like(x))
_define(
    "gelu_dropout_backward",
    f"(Tensor grad_out, Tensor x, {_DROP}) -> Tensor",
    "gelu_backward",
    lambda grad_out, x, *rest: _like(x),
)


def _gelu_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, seed, ctx.p, ctx.backend = inputs
    ctx.save_for_backward(x, seed)


def _gelu_autograd(ctx: Any, grad: Tensor) -> tuple:
    grad_x = _OPS.gelu_dropout_backward(grad, *ctx.saved_tensors, ctx.p, ctx.backend)
    return grad_x, None, None, None


torch.library.register_autograd("flmoe::gelu_dropout", _gelu_autograd, setup_context=_gelu_setup)


# ---- dropout_add_pool ----


def _pool_fake(
    residual: Tensor, update: Tensor, cu_segments: Tensor, views: int, *_rest: Any
) -> Tensor:
    experts, _, width = residual.shape
    return residual.new_empty((experts, views, cu_segments.shape[0] - 1, width))


def _pool_backward_fake(
    grad_out: Tensor, cu_segments: Tensor, views: int, rows: int, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    shape = (grad_out.shape[0], rows, grad_out.shape[3])
    return grad_out.new_empty(shape), grad_out.new_empty((0,) if seed is None else shape)


_define(
    "dropout_add_pool",
    f"(Tensor residual, Tensor update, Tensor cu_segments, int views, {_DROP}) -> Tensor",
    "pool",
    _pool_fake,
)
_define(
    "dropout_add_pool_backward",
    f"(Tensor grad_out, Tensor cu_segments, int views, int rows, {_DROP}) -> (Tensor, Tensor)",
    "pool_backward",
    _pool_backward_fake,
)


def _pool_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    residual, _, cu_segments, ctx.views, seed, ctx.p, ctx.backend = inputs
    ctx.rows = residual.shape[1]
    ctx.save_for_backward(cu_segments, seed)


def _pool_autograd(ctx: Any, grad: Tensor) -> tuple:
    cu_segments, seed = ctx.saved_tensors
    residual, update = _OPS.dropout_add_pool_backward(
        grad, cu_segments, ctx.views, ctx.rows, seed, ctx.p, ctx.backend
    )
    return residual, residual if seed is None else update, *(None,) * 5


torch.library.register_autograd(
    "flmoe::dropout_add_pool", _pool_autograd, setup_context=_pool_setup
)


# ---- expand_views ----

_define(
    "expand_views",
    "(Tensor x, Tensor modality, int views) -> Tensor",
    "views_of",
    lambda x, modality, views: x.new_empty((x.shape[0], views, *x.shape[2:])),
)
_define(
    "expand_views_backward",
    "(Tensor grad_out, Tensor modality) -> Tensor",
    "views_backward",
    lambda grad, modality: grad.new_empty((grad.shape[0], 2, *grad.shape[2:])),
)


def _views_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, modality, _, ctx.backend = inputs
    ctx.save_for_backward(modality)


def _views_autograd(ctx: Any, grad: Tensor) -> tuple:
    return _OPS.expand_views_backward(grad, *ctx.saved_tensors, ctx.backend), *(None,) * 3


torch.library.register_autograd("flmoe::expand_views", _views_autograd, setup_context=_views_setup)

for _name in (
    "expert_linear",
    "dropout_add_norm",
    "gelu_dropout",
    "dropout_add_pool",
    "expand_views",
):
    first_order_only(f"flmoe::{_name}_backward")
