"""Calls of every operator, and properties that all of them have on every backend."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from flmoe_kernels import expert_attention, pair_map, pair_moe, top_pairs
from flmoe_kernels.ops.routing.api import gate
from tests.support.attention_cases import Case
from tests.support.encoder_cases import (
    FORMS,
    encoder_inference_arguments,
    layers_arguments,
    operator_calls,
)
from tests.support.inputs import as_dtype, cumulative, draw, gradients, make_seed
from tests.support.operator_cases import OPS, tensors
from tests.support.pair_cases import PairCase
from tests.support.routed_cases import RoutedCase

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """A function of the inputs that can have a gradient, these inputs, and whether no other gradient is computed
    than those that are wanted."""

    function: Call
    inputs: list[Tensor]
    alone: bool = True


def calls(backend: str, dtype: torch.dtype) -> dict[str, OperatorCall]:
    found = {}
    for name, p in itertools.product(operator_calls(dtype, 0.0), (0.0, 0.5)):
        key = f"{name}, p={p}"
        found[key] = _encoder(name.split()[0], operator_calls(dtype, p)[name], backend)
    # On the CPU more than one block, and groups of items with sums of their own.
    length = 140 if backend == "cpu" else 4
    for p, lengths in ((0.0, (length, 0, 5)), (0.5, (max(length, 40), 0, 20))):
        attention = Case(lengths, 2, 3, groups=2, lead=1, tail=1)
        options: dict[str, Any] = {"dropout_p": p, "seed": make_seed(), "backend": backend}
        found[f"expert_attention, p={p}"] = OperatorCall(
            partial(_attend, attention.cu_seqlens, options),
            attention.qkv(dtype),
        )
    for reduce, rows, columns in (("none", length, 5), ("experts", 5, length), ("pool", 7, 5)):
        masks = "none" if reduce == "experts" else "both"
        pair = PairCase(rows, columns, reduce=reduce, masks=masks, top_k=2)
        found[f"pair_moe, {reduce}"] = OperatorCall(
            lambda *inputs, pair=pair: pair_moe(
                *inputs[:4], gate_bias=inputs[4], backend=backend, **pair.options()
            ),
            pair.inputs(dtype),
        )
    for name, gated in (("routed_mlp", False), ("routed_mlp, gated", True)):
        routed = RoutedCase(9, gated=gated)
        function = partial(routed.call, index=routed.index(), backend=backend)
        found[name] = OperatorCall(function, routed.inputs(dtype))
    logits, mask = draw(6, 4, dtype=dtype), torch.arange(6) % 3 != 1
    options = {"capacity": 2, "mask": mask, "backend": backend}
    found["routing_gate"] = OperatorCall(lambda x: gate(x, 2, **options).weight, [logits])
    packed, tail = (
        draw(2, 9, 3, 2, 4, dtype=dtype),
        (cumulative([4, 0, 3], 1), make_seed(), 0.3, 0.5),
    )
    found["expert_attention_packed"] = OperatorCall(
        lambda qkv: OPS.expert_attention_packed(qkv, *tail, backend)[0], [packed]
    )
    return found | (_triton_alone(dtype) if backend == "triton" else layers(backend, dtype))


def _triton_alone(dtype: torch.dtype) -> dict[str, OperatorCall]:
    mixed = [draw(2, 4, dtype=dtype), draw(4, 2, 3, dtype=dtype, seed=1)]
    tokens, mask = draw(2, 5, 3, dtype=dtype), torch.tensor([[True, False, True, True, False]] * 2)
    return {
        "mix_experts": OperatorCall(lambda *xs: OPS.mix_experts(*xs, 1.5, "triton"), mixed),
        "reweighting_features": OperatorCall(
            lambda x: OPS.reweighting_features(x, mask, [2, 3], 1, "triton")[0], [tokens]
        ),
    }


def layers(backend: str, dtype: torch.dtype, **sizes: int) -> dict[str, OperatorCall]:
    """encoder_layers, of which Triton's interpreter would take too long."""

    def call(form: str) -> OperatorCall:
        rows, *middle = layers_arguments(form, **sizes)
        weights = as_dtype(middle[5], dtype)

        def function(rows: Tensor, *weights: Tensor) -> Any:
            return OPS.encoder_layers(rows, *middle[:5], list(weights), *middle[6:], backend)[0]

        return OperatorCall(function, [rows.to(dtype), *weights], alone=False)

    return {f"encoder_layers, {form}": call(form) for form in FORMS}


def without_gradient(backend: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Calls of the operators that have no derivative."""
    pair = PairCase(5, 7, masks="both", top_k=2)
    q, k, a, c, bias = pair.inputs(dtype)
    head = draw(4, pair.width, dtype=dtype)
    options = {**pair.options(), "gate_bias": bias, "backend": backend}
    found: dict[str, Callable[[], object]] = {
        "pair_map": lambda: pair_map(q, k, a, c, head, **options),
        "top_pairs": lambda: top_pairs(q, k, a, c, head, n_pairs=3, **options),
    }
    if backend == "cpu":
        rows, index, *bounds, weights, experts, heads, eps, own = encoder_inference_arguments()
        weights = as_dtype(weights, dtype)
        rest = (index, *bounds, weights, experts, heads, eps, own)
        found["encoder_inference"] = lambda: OPS.encoder_inference(rows.to(dtype), *rest)
    return found


def _attend(cu_seqlens: Tensor, options: dict[str, Any], *qkv: Tensor) -> Any:
    return expert_attention(*qkv, cu_seqlens, **options)


def _encoder(name: str, arguments: Sequence[Any], backend: str) -> OperatorCall:
    places = [
        i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.dtype.is_floating_point
    ]

    def function(*inputs: Tensor) -> Any:
        filled = list(arguments)
        for place, x in zip(places, inputs, strict=True):
            filled[place] = x
        results = getattr(OPS, name)(*filled, backend)
        # The statistics of a norm have no gradient.
        return [x for x in tensors(results) if x.requires_grad]

    return OperatorCall(function, [arguments[i] for i in places])


def subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """Which inputs need a gradient: every choice with at least one."""
    return (each for each in itertools.product((False, True), repeat=count) if any(each))


def few_subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """Every input alone, and all inputs but one."""
    alone = [tuple(i == j for j in range(count)) for i in range(count)]
    rest = [tuple(not want for want in each) for each in alone]
    return iter(dict.fromkeys(each for each in (*alone, *rest) if any(each)))


class Recorded(TorchDispatchMode):
    """Operators of this package that run, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "flmoe":
            self.found.append((func, args, results))
        return results


def gradients_of(call: OperatorCall, wanted: Sequence[bool]) -> tuple[list[Tensor | None], int]:
    """Gradients of all inputs, None without one, and the elements that backward operators returned."""
    inputs = [
        as_dtype(x, x.dtype, requires_grad=want)
        for x, want in zip(call.inputs, wanted, strict=True)
    ]
    outputs = [x for x in tensors(call.function(*inputs)) if x.requires_grad]
    cotangents = [draw(*x.shape, dtype=x.dtype, seed=i) for i, x in enumerate(outputs)]
    with Recorded() as seen:
        torch.autograd.backward(outputs, cotangents)
    elements = sum(
        x.numel()
        for op, _, results in seen.found
        if "backward" in str(op)
        for x in tensors(results)
    )
    return [x.grad for x in inputs], elements


def check_frozen(call: OperatorCall, choices: Iterable[Sequence[bool]]) -> None:
    """Gradients of wanted inputs are those with all wanted, bit for bit, and nothing else is returned."""
    expected, _ = gradients_of(call, [True] * len(call.inputs))
    for wanted in choices:
        found, elements = gradients_of(call, wanted)
        for got, want, is_wanted in zip(found, expected, wanted, strict=True):
            assert (got is not None) == is_wanted
            if got is not None and want is not None:
                assert torch.equal(got, want)
                assert got.isfinite().all()
        sizes = zip(call.inputs, wanted, strict=True)
        largest = sum(x.numel() for x, is_wanted in sizes if is_wanted)
        assert elements <= largest or not call.alone


def _around(x: Tensor) -> Tensor:
    """The same values inside a larger tensor of NaN."""
    wide = torch.full([size + 5 for size in x.shape], float("nan"), dtype=x.dtype)
    inside = wide[tuple(slice(3, -2) for _ in x.shape)]
    return inside.copy_(x)


def _permuted(x: Tensor, one: int, other: int) -> Tensor:
    return x.transpose(one, other).contiguous().transpose(one, other) if x.dim() > 1 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a copy": torch.clone,
    "every second": lambda x: torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2],
    "columns first": lambda x: _permuted(x, -1, -2),
    "rows first": lambda x: _permuted(x, 0, 1),
    "inside another": _around,
}


def check_layouts(call: OperatorCall) -> None:
    """Results and gradients have the same bits in every call, and for inputs and cotangents of any strides."""

    def results(layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [layout(x.contiguous()).detach().requires_grad_() for x in call.inputs]
        outputs = [x for x in tensors(call.function(*leaves)) if x.requires_grad]
        cotangents = [layout(draw(*x.shape, dtype=x.dtype, seed=i)) for i, x in enumerate(outputs)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]

    expected = results(torch.clone)
    for name, layout in LAYOUTS.items():
        assert all(map(torch.equal, results(layout), expected)), name
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    outputs = [x for x in tensors(call.function(*leaves)) if x.requires_grad]
    expanded = [x.new_ones(()).expand_as(x) for x in outputs]
    grads = [
        torch.autograd.grad(outputs, leaves, ones, retain_graph=True)
        for ones in (expanded, [x.clone() for x in expanded])
    ]
    assert all(map(torch.equal, *grads)), "one expanded value"


def operators_of(call: OperatorCall) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered operators of a call and of its backward pass, also of that with every second gradient."""
    found: list[tuple[Any, tuple[Any, ...]]] = []
    for every in (1, 2):
        leaves = [as_dtype(x, x.dtype, i % every == 0) for i, x in enumerate(call.inputs)]
        with Recorded() as seen:
            gradients(tensors(call.function(*leaves)), [x for x in leaves if x.requires_grad])
        found += [(op, x) for op, x, _ in seen.found if every == 1 or "_backward" in str(op)]
    return found


def check_operator(op: Any, arguments: Sequence[Any], *tests: str) -> None:
    """torch.library.opcheck; without `tests` all of its tests."""

    derivative = "_backward" in str(op)

    def separate(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone().requires_grad_(x.requires_grad and not derivative)

    options = {"test_utils": tests} if tests else {}
    torch.library.opcheck(op, tree_map(separate, tuple(arguments)), **options)
