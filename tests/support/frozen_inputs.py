"""Calls of every differentiable operator, with gradients of some of their inputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flmoe_kernels import expert_attention, pair_moe
from flmoe_kernels.ops.routing.api import gate
from tests.support.attention_cases import Case
from tests.support.encoder_cases import operator_calls
from tests.support.inputs import as_dtype, draw, make_seed
from tests.support.operator_cases import OPS, tensors
from tests.support.pair_cases import PairCase
from tests.support.routed_cases import RoutedCase

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """A function of the inputs that can have a gradient, and these inputs."""

    function: Call
    inputs: list[Tensor]


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
        routed = RoutedCase(9, load="dropped", gated=gated)
        function = partial(routed.call, index=routed.index(), backend=backend)
        found[name] = OperatorCall(function, routed.inputs(dtype))
    logits = draw(6, 4, dtype=dtype)
    found["routing_gate"] = OperatorCall(lambda x: gate(x, 2, backend=backend).weight, [logits])
    if backend == "triton":
        mixed = [draw(2, 4, dtype=dtype), draw(4, 2, 3, dtype=dtype, seed=1)]
        found["mix_experts"] = OperatorCall(lambda *xs: OPS.mix_experts(*xs, 1.5, backend), mixed)
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


class BackwardResults(TorchDispatchMode):
    """Number of elements that this package's backward operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "flmoe" and "backward" in str(func):
            self.elements += sum(x.numel() for x in tensors(results))
        return results


def gradients_of(call: OperatorCall, wanted: Sequence[bool]) -> tuple[list[Tensor | None], int]:
    """Gradients of all inputs, None without one, and the elements that backward operators returned."""
    inputs = [
        as_dtype(x, x.dtype, requires_grad=want)
        for x, want in zip(call.inputs, wanted, strict=True)
    ]
    outputs = [x for x in tensors(call.function(*inputs)) if x.requires_grad]
    cotangents = [draw(*x.shape, dtype=x.dtype, seed=i) for i, x in enumerate(outputs)]
    with BackwardResults() as seen:
        torch.autograd.backward(outputs, cotangents)
    return [x.grad for x in inputs], seen.elements


def check(call: OperatorCall, wanted: Sequence[bool]) -> None:
    """Gradients of wanted inputs are those with all wanted, bit for bit, and nothing else is returned."""
    expected, _ = gradients_of(call, [True] * len(wanted))
    found, elements = gradients_of(call, wanted)
    for got, want, is_wanted in zip(found, expected, wanted, strict=True):
        if is_wanted:
            assert got is not None
            assert want is not None
            assert torch.equal(got, want)
            assert got.isfinite().all()
        else:
            assert got is None
    sizes = zip(call.inputs, wanted, strict=True)
    assert elements <= sum(x.numel() for x, is_wanted in sizes if is_wanted)
