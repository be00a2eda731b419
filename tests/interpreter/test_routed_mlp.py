"""Tests of the routed MLP's Triton kernels; test_routing.py tests those of routing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.tables import KNOWN
from flmoe_kernels.ops.routed_mlp import triton as kernels
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routed_mlp.call import RoutedCall
from flmoe_kernels.ops.routed_mlp.triton import choice, launch
from flmoe_kernels.ops.routed_mlp.triton.table import TABLE, Tiles
from flmoe_kernels.ops.routing import triton as routing_kernels
from flmoe_kernels.ops.routing.api import dispatch
from tests.support.inputs import as_dtype, draw
from tests.support.routed_cases import ACTIVATIONS, RoutedCase, check, run
from tests.support.routed_tests import BASE, GATED, RoutedTests

TRITON = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOADS = ("even", "hot", "dropped", "none")
# One token, none, several blocks of rows and columns, one full chunk, a partial chunk and several chunks.
SIZES = (
    RoutedCase(17),
    RoutedCase(1, 1, 1, 1, 1),
    RoutedCase(0, 4, 5),
    RoutedCase(150, 32, 64, 2),
    RoutedCase(45, 33, 140, 3, 3),
    RoutedCase(5, 16, 16, 64, 4),
    RoutedCase(257, 64, 20, 2, 1),
    RoutedCase(70, 130, 3, 3, 2),
    RoutedCase(300, 9, 65, 3, 1),
)
# All dtypes with all loads.
KINDS = [*itertools.product(DTYPES, LOADS)]


def cases() -> Iterator[Any]:
    """(case, dtype): each size twice, all activations with all dtypes, all numbers of choices, unequal loads."""
    for i, (size, j) in enumerate(itertools.product(SIZES, range(2))):
        dtype, load = KINDS[7 * i % len(KINDS)]
        marks = [pytest.mark.slow] if j and i >= len(KINDS) else []
        yield pytest.param(dataclasses.replace(size, load=load, gated=j == 1), dtype, marks=marks)
    for i, (dtype, act) in enumerate(itertools.product(DTYPES, ACTIVATIONS)):
        bias = (i + i // len(ACTIVATIONS)) % 2 == 0
        case = dataclasses.replace(BASE, act=act, bias=bias, load="dropped")
        yield from ((dataclasses.replace(case, gated=gated), dtype) for gated in (False, True))
    for choices, bias in itertools.product((1, 2, 3, 4), (True, False)):
        case = RoutedCase(30, experts=5, choices=choices, bias=bias, load="dropped")
        yield dataclasses.replace(case, gated=choices % 2 == 1), torch.float32
    # A choice of all eight experts: eight rows are rounded before their sum.
    for dtype in DTYPES[1:]:
        for gated in (False, True):
            yield RoutedCase(64, 24, 40, 8, 8, gated=gated), dtype
    yield RoutedCase(90, 9, 20, 16, 2, load="zipf"), torch.float32


@pytest.mark.parametrize(("case", "dtype"), [*cases()], ids=str)
def test_matches_the_reference(case: RoutedCase, dtype: torch.dtype) -> None:
    check(case, dtype, TRITON)


class TestTriton(RoutedTests):
    backend, acts = TRITON, ("silu", "relu")


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_far_out(act: str) -> None:
    """Values and slopes at saturation, zero and infinity agree with torch in float64."""
    case = RoutedCase(9, 1, 1, 1, 1, act, bias=False)
    points = torch.tensor([-3e4, -30.0, -6.0, -0.0, 0.0, 6.0, 30.0, 3e4, float("inf")])
    ones = torch.ones(1, 1, 1)
    inputs = [points[:, None], torch.ones(9, 1), ones, ones]
    index = torch.zeros(9, 1, dtype=torch.int64)
    found = run(case, inputs, index, TRITON)[:2]
    oracle = run(case, as_dtype(inputs, torch.float64), index, "reference")[:2]
    for got, want in zip(found, oracle, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_cotangents_propagate_as_in_torch(act: str) -> None:
    """They propagate even if the slope is 0, except for relu."""
    ones, index = torch.ones(1, 1, 1), torch.zeros(3, 1, dtype=torch.int64)
    found = []
    for backend in (TRITON, "reference"):
        x = torch.tensor([[-300.0], [-1.0], [2.0]], requires_grad=True)
        tail = (torch.ones(3, 1), ones, None, ones, None)
        out = routed_mlp(x, index, *tail, act=act, backend=backend)
        found.append(torch.autograd.grad(out, x, torch.full_like(out, float("nan")))[0])
    assert torch.equal(found[0].isnan(), found[1].isnan())
    assert found[0].isnan().any()


def test_a_token_may_choose_an_expert_twice() -> None:
    index = torch.randint(-1, 4, (40, 2), generator=torch.Generator().manual_seed(3))
    index[:3] = 2
    inputs = BASE.inputs(torch.float32)
    found, want = (run(BASE, inputs, index, backend) for backend in (TRITON, "reference"))
    for name, got, expected in zip(BASE.names, found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_an_expert_in_splits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients are sums of parts, some of which have no rows."""
    monkeypatch.setattr(launch, "splits_of", lambda _tiles, _call: 3)
    hot = RoutedCase(90, 20, 35, 2, 2, load="hot")
    for case in (hot, RoutedCase(99, 7, 9, 2, 1, bias=False, gated=True)):
        check(case, dtype, TRITON)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        *((RoutedCase(150, 33, 70, 2, 2, load="dropped"), one) for one in KNOWN),
        (RoutedCase(150, 33, 70, 2, 2, load="dropped", gated=True), 90),
        *(
            (RoutedCase(9, 1026, 1024, 1, 1, bias=False, gated=gated), 90)
            for gated in (False, True)
        ),
    ],
    ids=str,
)
def test_tiles_of_an_architecture(
    case: RoutedCase, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles agree with the launch table for odd widths and for large products."""
    monkeypatch.setattr(choice, "architecture_of", lambda _device: architecture)
    check(case, torch.bfloat16, TRITON)


def test_every_tile_of_several_bands_is_visited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert has nine blocks of rows, in bands of eight, and two blocks of columns."""
    for row in list(TABLE):
        monkeypatch.setitem(TABLE, row, Tiles(16, 16, 16, 1, 4, 1, (0, 0, 0)))
    case = RoutedCase(280, 18, 20, 2, 1)
    assert torch.bincount(case.index().view(-1)).min() > 8 * 16
    check(case, torch.float32, TRITON)


def test_launches_and_buffers_do_not_depend_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph that was captured for one load is valid for all loads."""
    recorded: list[list[object]] = []

    def record(launches: list[Launch], _device: torch.device) -> None:
        for one in launches:
            shapes = [
                tuple(x.shape) if isinstance(x, Tensor) else x for x in one.arguments.values()
            ]
            recorded[-1].append((one.kernel, one.programs, shapes, one.constants))
        run_launches(launches, _device)

    run_launches = kernels.run
    for module in (kernels, routing_kernels):
        monkeypatch.setattr(module, "run", record)
    for load in LOADS:
        recorded.append([])
        case = dataclasses.replace(GATED, load=load)
        run(case, case.inputs(torch.float32), case.index(), TRITON)
    assert len(recorded[0]) > 8
    assert all(calls == recorded[0] for calls in recorded)


def test_invalid_places_and_offsets_are_not_used_as_addresses() -> None:
    """With tensors that do not come from a dispatch, rows of valid places are computed and the call ends. An
    address from an invalid place or offset would be far outside any tensor."""
    inputs = GATED.inputs(torch.float32)
    _, offsets, permutation = dispatch(BASE.index(), 4, backend="reference")
    want = kernels.forward(RoutedCall(*inputs, offsets, permutation, 0), True)[1]
    wild, far = permutation.clone(), offsets.clone()
    wild[3], wild[7] = -(2**31), 2**31 - 1
    far[0], far[4] = -(2**31), 2**31 - 1
    call = RoutedCall(*inputs, far, wild, 0)
    out, hidden = kernels.forward(call, True)
    left = torch.ones(want.shape[1], dtype=torch.bool)
    left[3] = left[7] = False
    assert torch.equal(hidden[:, left], want[:, left])
    kernels.backward(call, torch.ones_like(out), hidden, [True] * 8)


def test_offsets_beyond_32_bits() -> None:
    """Only the last rows of buffers with more than 2^31 elements are accessed."""
    rows, width, hidden = 2**24 + 3, 128, 130

    def untouched(*shape: int) -> Tensor:
        return torch.from_numpy(np.empty(shape, np.float16))

    x, grad, out, grad_x = (untouched(rows, width) for _ in range(4))
    before, active, grad_hidden, again = (untouched(rows, hidden) for _ in range(4))
    assert out.numel() > 2**31
    weight, permutation = untouched(rows, 1), torch.from_numpy(np.empty(rows, np.int32))
    last = slice(rows - 3, rows)
    for i, tensor in enumerate((x, grad, weight)):
        tensor[last] = draw(3, tensor.shape[1], dtype=torch.float16, seed=i)
    permutation[last] = torch.arange(rows - 3, rows, dtype=torch.int32)
    weights = [
        draw(1, *s, dtype=torch.float16, seed=9, scale=0.1) for s in ((130, 128), (128, 130))
    ]

    def call(x: Tensor, weight: Tensor, permutation: Tensor, first: int, end: int) -> RoutedCall:
        offsets = torch.tensor([first, end], dtype=torch.int32)
        parameters = (weights[0], None, weights[1], None, None, None)
        return RoutedCall(x, weight, *parameters, offsets, permutation, 0)

    big = call(x, weight, permutation, rows - 3, rows)
    tiles = {
        kernel: choice.tiles_of(kernel, big)
        for kernel in ("hidden", "rows", "hidden_gradient", "weight_gradient")
    }
    of_gradient = tiles["hidden_gradient"]
    dots = torch.from_numpy(np.empty((rows, launch.dot_parts(of_gradient, big)), np.float32))
    sides = (grad, True), (again, False)
    grad_w = torch.empty(1, width, hidden, dtype=torch.float16)
    grads_w = (grad_w, None, None, None)
    for one in (
        launch.hidden_launch(tiles["hidden"], big, before, active),
        launch.rows_launch(tiles["rows"], big, active, out),
        launch.hidden_gradient_launch(of_gradient, big, grad, before, grad_hidden, again, dots),
        launch.token_gradient_launch(tiles["rows"], big, grad_hidden, grad_x),
        launch.weight_gradient_launch(tiles["weight_gradient"], big, *sides, grads_w, 1, None),
    ):
        one.run()
    small = call(x[last], weight[last], torch.arange(3, dtype=torch.int32), 0, 3)
    expected, h = kernels.forward(small, True)
    wants = [True, True, True, False, True, False, False, False]
    grads = kernels.backward(small, grad[last], h, wants)
    for got, want in zip(
        (out[last], before[last], grad_x[last], grad_w),
        (expected, h, grads[0], grads[4]),
        strict=True,
    ):
        assert torch.equal(got, want)
