"""The encoder's operators in the native CPU module; makes tensors contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.dropout import DRAWS, keep_threshold
from flmoe_kernels.core.dtypes import dtype_code, statistics_dtype
from flmoe_kernels.core.native import address, empty, native, threads
from flmoe_kernels.core.operands import contiguous, expect, expect_bounds, expect_seed

from .inference import FIRST_BIAS, LAYER_TENSORS, layer_shapes
from .wants import rows_wanted


def _address_if(x: Tensor, wanted: bool) -> int:
    return address(x) if wanted else 0


def _dropout(seed: Tensor | None, p: float) -> tuple[int, int]:
    expect_seed(seed)
    return address(seed), DRAWS if seed is None else keep_threshold(p)


def _expect_linear(x: Tensor, weight: Tensor) -> None:
    expect("x", x, (weight.shape[0], x.shape[1], weight.shape[2]), x.dtype)
    expect("weight", weight, weight.shape, x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _expect_linear(x, weight)
    expect("bias", bias, weight.shape[:2], x.dtype)
    x, weight = x.contiguous(), weight.contiguous()
    bias = contiguous(bias)
    experts, rows, in_width = x.shape
    out = empty((experts, rows, weight.shape[1]), x)
    native().linear_forward(
        dtype_code(x),
        *map(address, (x, weight, bias, out)),
        experts,
        rows,
        in_width,
        weight.shape[1],
        threads(),
    )
    return out


def linear_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _expect_linear(x, weight)
    expect("grad_out", grad_out, (*x.shape[:2], weight.shape[1]), x.dtype)
    grad_out, x, weight = grad_out.contiguous(), x.contiguous(), weight.contiguous()
    experts, rows, in_width = x.shape
    out_width = weight.shape[1]
    grad_x = empty(x.shape if want_x else (0,), x)
    grad_weight = empty(weight.shape if want_weight else (0,), x)
    grad_bias = empty((experts, out_width) if want_bias else (0,), x)
    native().linear_backward(
        dtype_code(x),
        *map(address, (x, weight, grad_out)),
        _address_if(grad_x, want_x),
        _address_if(grad_weight, want_weight),
        _address_if(grad_bias, want_bias),
        experts,
        rows,
        in_width,
        out_width,
        threads(),
    )
    return grad_x, grad_weight, grad_bias


def norm(
    residual: Tensor | None,
    update: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = residual if update is None else update
    assert source is not None
    for name, each in (("residual", residual), ("update", update)):
        expect(name, each, source.shape, source.dtype)
    for name, each in (("gain", gain), ("shift", shift)):
        expect(name, each, (source.shape[0], source.shape[2]), source.dtype)
    residual, update = contiguous(residual), contiguous(update)
    gain, shift = gain.contiguous(), shift.contiguous()
    x = residual if update is None else update
    assert x is not None
    total = empty(x.shape if update is not None else (0,), x)
    normed = empty(x.shape, x)
    mean, rstd = (empty(x.shape[:2], x, statistics_dtype(x.dtype)) for _ in range(2))
    native().norm_forward(
        dtype_code(x),
        *map(address, (residual, update, gain, shift)),
        eps,
        _dropout(seed, p),
        residual is None,
        *map(address, (total, normed, mean, rstd)),
        *x.shape,
        threads(),
    )
    return total, normed, mean, rstd


def norm_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, update, gain and shift, see rows_wanted; those not requested are empty."""
    for name, each in (("grad_total", grad_total), ("grad_normed", grad_normed), ("total", total)):
        expect(name, each, total.shape, total.dtype)
    for name, each in (("mean", mean), ("rstd", rstd)):
        expect(name, each, total.shape[:2], statistics_dtype(total.dtype))
    expect("gain", gain, (total.shape[0], total.shape[2]), total.dtype)
    total, mean, rstd = total.contiguous(), mean.contiguous(), rstd.contiguous()
    grad_total, grad_normed = contiguous(grad_total), contiguous(grad_normed)
    gain = gain.contiguous()
    want_rows = rows_wanted(seed, self_residual, wants)
    rows = [empty(total.shape if want else (0,), total) for want in want_rows]
    affine = [gain.new_empty(gain.shape if want else (0,)) for want in wants[2:]]
    native().norm_backward(
        dtype_code(total),
        *map(address, (total, mean, rstd, gain)),
        _dropout(seed, p),
        self_residual,
        *map(address, (grad_total, grad_normed)),
        *map(_address_if, (*rows, *affine), (*want_rows, *wants[2:])),
        *total.shape,
        threads(),
    )
    return rows[0], rows[1], affine[0], affine[1]


def _mlp_sizes(x: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[int, ...]:
    _expect_linear(x, w_in)
    experts, hidden_width, in_width = w_in.shape
    out_width = w_out.shape[1]
    expect("w_out", w_out, (experts, out_width, hidden_width), x.dtype)
    return experts, x.shape[1], in_width, hidden_width, out_width


def mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and the hidden rows before the GELU."""
    sizes = _mlp_sizes(x, w_in, w_out)
    for name, bias, weight in (("b_in", b_in, w_in), ("b_out", b_out, w_out)):
        expect(name, bias, weight.shape[:2], x.dtype)
    operands = [each.contiguous() for each in (x, w_in, w_out, b_in, b_out)]
    out, hidden = (empty((*x.shape[:2], weight.shape[1]), x) for weight in (w_out, w_in))
    native().mlp_forward(
        dtype_code(x),
        *map(address, operands),
        _dropout(seed, p),
        *map(address, (hidden, out)),
        *sizes,
        threads(),
    )
    return out, hidden


def mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    hidden: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    seed: Tensor | None,
    p: float,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, w_in, b_in, w_out and b_out; those not requested are empty."""
    sizes = _mlp_sizes(x, w_in, w_out)
    for name, rows, weight in (("grad_out", grad_out, w_out), ("hidden", hidden, w_in)):
        expect(name, rows, (*x.shape[:2], weight.shape[1]), x.dtype)
    grad_out, hidden = grad_out.contiguous(), hidden.contiguous()
    operands = [each.contiguous() for each in (x, w_in, w_out)]
    shapes = (x.shape, w_in.shape, w_in.shape[:2], w_out.shape, w_out.shape[:2])
    grads = [empty(shape if want else (0,), x) for shape, want in zip(shapes, wants, strict=True)]
    native().mlp_backward(
        dtype_code(x),
        *map(address, operands),
        _dropout(seed, p),
        *map(address, (hidden, grad_out)),
        *map(_address_if, grads, wants),
        *sizes,
        threads(),
    )
    return tuple(grads)


def _pool_sizes(shape: torch.Size, cu_segments: Tensor, views: int) -> tuple[int, ...]:
    expect_bounds("cu_segments", cu_segments)
    experts, rows, width = shape
    if views < 1 or rows % views:
        raise ValueError(f"views: expected a divisor of {rows} rows, got {views}")
    return experts, views, rows // views, cu_segments.numel() - 1, width


def pool(
    residual: Tensor, update: Tensor, cu_segments: Tensor, views: int, seed: Tensor | None, p: float
) -> Tensor:
    expect("update", update, residual.shape, residual.dtype)
    residual, update, cu_segments = (x.contiguous() for x in (residual, update, cu_segments))
    sizes = _pool_sizes(residual.shape, cu_segments, views)
    out = empty((sizes[0], views, sizes[3], sizes[4]), residual)
    native().pool_forward(
        dtype_code(residual),
        *map(address, (residual, update, cu_segments)),
        _dropout(seed, p),
        address(out),
        *sizes,
        threads(),
    )
    return out


def pool_backward(
    grad_out: Tensor,
    cu_segments: Tensor,
    views: int,
    rows: int,
    seed: Tensor | None,
    p: float,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of residual and update, see rows_wanted; those not requested are empty."""
    grad_out, cu_segments = grad_out.contiguous(), cu_segments.contiguous()
    expect(
        "grad_out",
        grad_out,
        (grad_out.shape[0], views, cu_segments.numel() - 1, grad_out.shape[3]),
        grad_out.dtype,
    )
    shape = torch.Size((grad_out.shape[0], rows, grad_out.shape[3]))
    wants = rows_wanted(seed, False, wants)
    grad_residual, grad_update = (empty(shape if want else (0,), grad_out) for want in wants)
    native().pool_backward(
        dtype_code(grad_out),
        *map(address, (grad_out, cu_segments)),
        _dropout(seed, p),
        *map(_address_if, (grad_residual, grad_update), wants),
        *_pool_sizes(shape, cu_segments, views),
        threads(),
    )
    return grad_residual, grad_update


def views_of(x: Tensor, modality: Tensor, views: int) -> Tensor:
    experts, _, rows, width = x.shape
    expect("x", x, (experts, 2, rows, width), x.dtype)
    expect("modality", modality, (rows,), torch.int32)
    x, modality = x.contiguous(), modality.contiguous()
    out = empty((experts, views, rows, width), x)
    native().views_forward(
        dtype_code(x), *map(address, (x, modality, out)), experts, views, rows, width, threads()
    )
    return out


def views_backward(grad_out: Tensor, modality: Tensor) -> Tensor:
    experts, views, rows, width = grad_out.shape
    expect("modality", modality, (rows,), torch.int32)
    grad_out, modality = grad_out.contiguous(), modality.contiguous()
    grad_x = empty((experts, 2, rows, width), grad_out)
    native().views_backward(
        dtype_code(grad_out),
        *map(address, (grad_out, modality, grad_x)),
        experts,
        views,
        rows,
        width,
        threads(),
    )
    return grad_x


def inference(
    rows: Tensor,
    index: Tensor | None,
    cu_samples: Tensor,
    cu_segments: Tensor,
    weights: Sequence[Tensor],
    experts: int,
    heads: int,
    eps: float,
    self_residual: bool,
) -> Tensor:
    sets, table, width = rows.shape
    layers = len(weights) // max(experts * LAYER_TENSORS, 1)
    if experts < 1 or layers < 1 or len(weights) != experts * layers * LAYER_TENSORS:
        raise ValueError(
            f"weights: expected {LAYER_TENSORS} for each layer of {experts} experts, got {len(weights)}"
        )
    if sets not in (1, experts):
        raise ValueError(f"rows: expected 1 or {experts} sets, got {sets}")
    hidden = weights[FIRST_BIAS].numel()
    shapes = layer_shapes(width, hidden)
    dtype = rows.dtype
    for place, weight in enumerate(weights):
        if (
            weight.shape != shapes[place % LAYER_TENSORS]
            or weight.dtype is not dtype
            or not weight.is_cpu
        ):
            expect(f"weights[{place}]", weight, shapes[place % LAYER_TENSORS], dtype)
    if heads < 1 or width % heads:
        raise ValueError(f"heads: expected a divisor of {width}, got {heads}")
    for name, bounds in (("cu_samples", cu_samples), ("cu_segments", cu_segments)):
        expect_bounds(name, bounds)
    if index is not None:
        expect("index", index, (index.numel(),), torch.int64)
    rows, cu_samples, cu_segments = (x.contiguous() for x in (rows, cu_samples, cu_segments))
    index, kept = contiguous(index), [weight.contiguous() for weight in weights]
    segments = cu_segments.numel() - 1
    out = empty((experts, segments, width), rows)
    native().encoder_inference(
        dtype_code(rows),
        *map(address, (rows, index, cu_samples, cu_segments)),
        [weight.data_ptr() for weight in kept],
        address(out),
        (
            *(sets, table, table if index is None else index.numel(), cu_samples.numel() - 1),
            *(segments, experts, layers, width, hidden, heads),
        ),
        eps,
        self_residual,
        threads(),
    )
    return out
