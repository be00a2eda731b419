"""torch.library registration of encoder_layers: schema, fakes, FLOP, autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import flops
from flmoe_kernels.core.backend import CPU, TRITON
from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.core.flops import values_of
from flmoe_kernels.core.registration import (
    define,
    define_derivative,
    loop_over_gradients,
)
from flmoe_kernels.ops.expert_attention.op import product_flops

from .inference import FIRST_BIAS, LAYER_TENSORS
from .layers import (
    PLACES,
    Kernels,
    Options,
    Rows,
    backward,
    flows,
    forward,
    stack,
)
from .steps import Weights, steps_of

_PLAN = "Tensor? modality, Tensor? index, Tensor cu_samples, Tensor cu_segments, Tensor? count"
_OPTIONS = "float[] rates, SymInt heads, SymInt views, float eps, bool self_residual"


# Range of torch's profiler for each function of a backend, and the places of the weights among the flat arguments.
# The range of a function with one weight names its widths.
_RANGES: dict[str, tuple[str, tuple[int, ...]]] = {
    "linear": ("expert_linear", (1,)),
    "norm": ("dropout_add_norm", ()),
    "mlp": ("expert_mlp", (1, 3)),
    "pool": ("dropout_add_pool", ()),
    "views_of": ("expand_views", ()),
    "forward": ("expert_attention", ()),
    "norm_linear": ("norm_linear", (3,)),
    "add_linear": ("add_linear", (2,)),
    "norm_mlp": ("norm_mlp", (3, 5)),
    "linear_backward": ("expert_linear_backward", (2,)),
    "norm_backward": ("dropout_add_norm_backward", ()),
    "mlp_backward": ("expert_mlp_backward", (3, 4)),
    "pool_backward": ("dropout_add_pool_backward", ()),
    "views_backward": ("expand_views_backward", ()),
    "backward": ("expert_attention_backward", ()),
    "norm_linear_backward": ("norm_linear_backward", (7,)),
    "norm_mlp_backward": ("norm_mlp_backward", (8, 9)),
}


class _Recorded:
    """A module whose functions are ranges, with the names of the operators."""

    def __init__(self, module: Any, ranges: Callable[[str], Any]) -> None:
        self._module, self._ranges = module, ranges

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name not in _RANGES:
            return function
        operator, places = _RANGES[name]

        def run(*args: Any, **options: Any) -> Any:
            label, values = f"flmoe::{operator}", [*_flat(args)]
            weights = [values[place] for place in places]
            if len(weights) == 1:
                label += f" {weights[0].shape[2]} to {weights[0].shape[1]}"
            with self._ranges(label):
                results = function(*args, **options)
                if flops.observer is not None:
                    flops.observer(label, _step_flops(name, values, weights), values, results)
            return results

        return run


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _step_flops(name: str, values: Sequence[Any], weights: Sequence[Tensor]) -> int:
    """FLOP of a step; of a backward those of all gradients."""
    match name:
        case "forward":
            return 2 * product_flops(values[0].shape, values[3])
        case "backward":  # after the three gradients and that of the output
            return 5 * product_flops(values[4].shape, values[9])
    if not weights:
        return 0
    rows = next(x.shape[1] for x in values if isinstance(x, Tensor) and x.ndim == 3)
    return 2 * (1 + name.endswith("backward")) * rows * sum(x.numel() for x in weights)


def _kernels(backend: str) -> Kernels:
    ranges: Callable[[str], Any] | None = None
    if torch.autograd.profiler._is_profiler_enabled or flops.observer is not None:
        ranges = torch.profiler.record_function
    match backend:
        case "cpu":
            from flmoe_kernels.ops.expert_attention import cpu as attention

            from . import cpu

            modules: tuple[Any, Any] = cpu, attention
        case "triton":
            from flmoe_kernels.core.triton import launches
            from flmoe_kernels.ops.expert_attention import triton as triton_attention

            from . import triton

            if launches.recording():
                ranges = launches.recorded_range
            modules = triton, triton_attention
        case _:
            raise ValueError(f"backend: expected cpu or triton, got {backend!r}")
    return Kernels(*(_Recorded(x, ranges) if ranges else x for x in modules))


def _run(
    backend: str,
    compute: Callable[..., list[Tensor]],
    inputs: Sequence[Tensor | None],
    *options: Any,
) -> list[Tensor]:
    """compute(*inputs), on Triton from a plan of its launches, which has no steps to observe."""
    if backend != TRITON or flops.observer is not None:
        return compute(*inputs)
    from flmoe_kernels.core.triton.plans import repeated

    return [*repeated(compute, inputs, *options)]


def _forward(backend: str, rows: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    plan, weights, seeds, options, save = _arguments(args)
    if plan.valid_rows is not None and backend == CPU:
        raise ValueError("count: expected None on the CPU")
    buffers = stack(weights, rows.shape[0], rows.shape[3], rows.dtype)
    hidden = weights[FIRST_BIAS].numel()

    def compute(rows: Tensor, *tensors: Any) -> list[Tensor]:
        plan, seeds, buffers = Rows(*tensors[:5]), tensors[5], tensors[6:]
        return forward(_kernels(backend), rows, plan, buffers, hidden, seeds, options, save)

    inputs = [rows.contiguous(), *plan, seeds, *buffers]
    latents, *saved = _run(backend, compute, inputs, "encoder_layers", hidden, options, save)
    return latents, [*buffers, *saved] if save else []


def _arguments(args: Sequence[Any]) -> tuple[Rows, list[Tensor], Tensor | None, Options, bool]:
    """The arguments of encoder_layers after the rows."""
    return Rows(*args[:5]), args[5], args[6], Options(tuple(args[7]), *args[8:12]), args[12]


def _fake(backend: str, rows: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    plan, weights, _, options, save = _arguments(args)
    experts, copies, n, width = rows.shape
    index, views, heads = plan.source, options.views, options.heads
    groups, length = (experts, index.shape[0]) if index is not None else (experts * views, n)
    count, hidden = groups * length // experts, weights[FIRST_BIAS].shape[0]
    segments = groups // experts * (plan.cu_segments.shape[0] - 1)
    latents = rows.new_empty((experts, segments, width))
    layers = len(weights) // (experts * LAYER_TENSORS)
    if not save:
        return latents, []
    statistics = statistics_dtype(rows.dtype)
    fused = steps_of(_kernels(backend).encoder, rows, hidden).fused
    saved = [
        rows.new_empty(experts * layers * (6 * width + hidden)),
        rows.new_empty((experts * layers * (4 * width + hidden), width)),
        rows.new_empty((experts * layers * width, hidden)),
    ]

    def norm(size: int) -> list[Tensor]:
        mean, rstd = (rows.new_empty((experts, size), dtype=statistics) for _ in range(2))
        return [mean, rstd, rows.new_empty((0,) if fused else (experts, size, width))]

    for layer in range(layers):
        if layer > 0:
            saved.append(rows.new_empty((experts, count, width)))
        saved += norm(copies * n if layer == 0 else count)
        saved += [
            rows.new_empty((groups, length, 3, heads, width // heads)),
            rows.new_empty((groups, length, heads, width // heads)),
            rows.new_empty((groups, length, heads), dtype=statistics),
            rows.new_empty((experts, count, width)),
            *norm(count),
            rows.new_empty((experts, count, hidden)),
        ]
    return latents, saved


def _products(rows: Tensor, plan: Rows, hidden: int, views: int) -> tuple[int, int, int, int, int]:
    """FLOP of: q, k, v of the first layer; q, k, v of a later layer; attention scores; projection; one of the two
    MLP products. The product of probabilities and values costs as much as the scores."""
    experts, copies, n, width = rows.shape
    count = experts * (views * n if plan.source is None else plan.source.shape[0])
    bounds = values_of(plan.cu_samples)
    if bounds is None:
        samples = torch.sym_max(plan.cu_samples.shape[0] - 1, 1)
        pairs = (
            count * n // samples if plan.source is None else count * count // (experts * samples)
        )
    else:
        pairs = sum((end - start) ** 2 for start, end in pairwise(bounds))
        pairs *= experts * (views if plan.source is None else 1)
    square = 2 * width * width
    return (
        *(3 * experts * copies * n * square, 3 * count * square),
        *(2 * pairs * width, count * square, 2 * count * width * hidden),
    )


def _flops(rows: Tensor, *args: Any) -> int:
    plan, weights, _, options, _ = _arguments(args)
    layers = len(weights) // (rows.shape[0] * LAYER_TENSORS)
    first, qkv, scores, proj, mlp = _products(
        rows, plan, weights[FIRST_BIAS].shape[0], options.views
    )
    return first + (layers - 1) * qkv + layers * (2 * scores + proj + 2 * mlp)


def _wants(wants: Sequence[bool]) -> list[Weights]:
    size = len(Weights._fields)
    return [Weights(*wants[i : i + size]) for i in range(1, len(wants), size)]


def _backward(backend: str, grad: Tensor, rows: Tensor, *args: Any) -> list[Tensor]:
    plan, seeds, saved, options, wants = _backward_arguments(args)

    def compute(rows: Tensor, grad: Tensor, *tensors: Any) -> list[Tensor]:
        plan, seeds, saved = Rows(*tensors[:5]), tensors[5], tensors[6:]
        kernels, of_layers = _kernels(backend), _wants(wants)
        return backward(kernels, grad, rows, plan, seeds, saved, options, wants[0], of_layers)

    inputs = [rows.contiguous(), grad.contiguous(), *plan, seeds, *saved]
    return _run(backend, compute, inputs, "encoder_layers_backward", options, wants)


def _backward_arguments(
    args: Sequence[Any],
) -> tuple[Rows, Tensor | None, list[Tensor], Options, tuple[bool, ...]]:
    """The arguments of encoder_layers_backward after the gradient and the rows."""
    options = Options(tuple(args[7]), *args[8:12])
    return Rows(*args[:5]), args[5], args[6], options, tuple(args[12])


def _backward_fake(grad: Tensor, rows: Tensor, *args: Any) -> list[Tensor]:
    _, _, saved, _, wants = _backward_arguments(args)
    experts, width, hidden = rows.shape[0], rows.shape[3], saved[2].shape[1]
    vector = (experts * width,)
    shapes = Weights(
        *(vector, vector, (experts * 3 * width, width), (experts * width, width)),
        *(vector, vector, vector, (experts * hidden, width), (experts * hidden,)),
        *((experts * width, hidden), vector),
    )
    grads = [rows.new_empty(rows.shape if wants[0] else (0,))]
    for layer in _wants(wants):
        grads += [
            rows.new_empty(shape if want else (0,))
            for shape, want in zip(shapes, layer, strict=True)
        ]
    return grads


def _backward_flops(_grad: Tensor, rows: Tensor, *args: Any) -> int:
    plan, _, saved, options, wants = _backward_arguments(args)
    first, others, scores, proj, mlp = _products(rows, plan, saved[2].shape[1], options.views)
    layers, total = _wants(wants), 0
    for i, (flow, want) in enumerate(zip(flows(wants[0], layers), layers, strict=True)):
        qkv = first if i == 0 else others
        total += qkv * (flow.normed1 + want.qkv) + proj * (flow.qkv + want.proj)
        total += 5 * scores * flow.qkv
        through = flow.normed2 or want.w_in or want.b_in
        total += mlp * (flow.normed2 + want.w_in + through + want.w_out)
    return total


def _setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, list[Tensor]]) -> None:
    rows, *args, ctx.backend = inputs
    plan, weights, seeds, ctx.options, save = _arguments(args)
    if not save:
        raise ValueError("save: expected True in a call that is differentiated")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1])
    ctx.dtypes = [weight.dtype for weight in weights]
    ctx.save_for_backward(rows, *plan, seeds, *output[1])


@functools.cache
def _places(experts: int, layers: int) -> list[list[int]]:
    """For the Weights of each layer, the places of their tensors among the weights."""
    return [
        [
            (expert * layers + layer) * LAYER_TENSORS + place
            for expert in range(experts)
            for place in kind
        ]
        for layer in range(layers)
        for kind in PLACES
    ]


def _autograd(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
    # Read once: checkpointing and hooks unpack the tensors at every read.
    tensors = ctx.saved_tensors
    rows, *plan, seeds = tensors[:7]
    saved = tensors[7:]
    want_rows, *needs = ctx.needs_input_grad[2:]
    results: list[Tensor | None] = [None] * len(needs)
    if grad is None:
        return None, results
    experts, width = int(rows.shape[0]), rows.shape[3]
    kinds = _places(experts, len(needs) // (experts * LAYER_TENSORS))
    wanted = [want_rows, *(any(needs[i] for i in kind) for kind in kinds)]
    of_rows, *grads = torch.ops.flmoe.encoder_layers_backward(
        grad,
        rows,
        *plan,
        seeds,
        saved,
        *ctx.options,
        wanted,
        ctx.backend,
    )
    for kind, flat, want in zip(kinds, grads, wanted[1:], strict=True):
        if not want:
            continue
        dtype = ctx.dtypes[kind[0]]
        flat = flat if flat.dtype is dtype else flat.to(dtype)
        # Only q has another number of rows than the second tensor of its kind.
        sizes = (
            [width, 2 * width] * experts
            if len(kind) > experts
            else [len(flat) // experts] * experts
        )
        for i, part in zip(kind, flat.split_with_sizes(sizes), strict=True):
            results[i] = part if needs[i] else None
    return of_rows if want_rows else None, results


define(
    "encoder_layers",
    f"(Tensor rows, {_PLAN}, Tensor[] weights, Tensor? seeds, {_OPTIONS}, bool save) "
    "-> (Tensor, Tensor[])",
    _forward,
    _fake,
    flops=_flops,
    fake_by_backend=True,
)
define_derivative("encoder_layers", 6, _setup, _autograd)
define(
    "encoder_layers_backward",
    f"(Tensor grad_out, Tensor rows, {_PLAN}, Tensor? seeds, Tensor[] saved, {_OPTIONS}, bool[] wants) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)
loop_over_gradients("encoder_layers_backward")
