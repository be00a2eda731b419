"""Tests of routed_mlp that every backend must pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flmoe_kernels.ops.routing.api import dispatch
from tests.support.inputs import INF, NAN, draw
from tests.support.routed_cases import RoutedCase, fused, run

OPS = torch.ops.flmoe
BASE = RoutedCase(40, 6, 9, 4, 2)
GATED = dataclasses.replace(BASE, act="silu", load="dropped", gated=True)
either = pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])


def with_cotangent(
    case: RoutedCase, inputs: list[Tensor], index: Tensor, backend: str, cotangent: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = case.call(*leaves, index=index, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


class RoutedTests:
    """Subclasses set a backend, activations whose formula is torch's at infinity, and calls of opcheck: dtype,
    with biases."""

    backend: str
    acts: tuple[str, ...]
    checked: tuple[tuple[torch.dtype, bool], ...]

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize(
        ("gated", "which"),
        [*((False, i) for i in range(7)), *((True, i) for i in (0, 2, 3, 6, 7, 8))],
    )
    def test_nan_and_inf_stay_in_their_own_rows(
        self, gated: bool, which: int, value: float
    ) -> None:
        """NaN or infinity in an input or in the cotangent."""
        for act in self.acts:
            self.check_rows(dataclasses.replace(GATED, act=act, gated=gated), which, value)

    def check_rows(self, case: RoutedCase, which: int, value: float) -> None:
        index, positive = case.index(), [x.abs() + 0.1 for x in case.inputs(torch.float32)]
        places = [*positive, torch.ones_like(positive[0])]
        places[which].view(-1)[1] = value
        *inputs, cotangent = places
        results = [
            with_cotangent(case, inputs, index, backend, cotangent)
            for backend in (self.backend, "reference")
        ]
        # relu can turn a negative infinity into 0.
        assert value == -INF or not all(x.isfinite().all() for x in results[0])
        for name, got, want in zip(case.names, *results, strict=True):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(got), kind(want)), (name, kind)

    def test_dropped_rows_and_empty_experts_give_exact_zeros(self) -> None:
        """Holds for any weights of experts without rows, any biases of the others and any values of dropped
        tokens."""
        for choices in (1, 2):
            case = RoutedCase(20, 6, 9, 4, choices, gated=choices == 2)
            inputs, index = case.inputs(torch.float32), torch.zeros(20, choices, dtype=torch.int64)
            index[5:] = -1
            for x in inputs[2:]:
                x[1:] = NAN
            inputs[0][5:], inputs[1][5:] = NAN, INF
            cotangent = draw(20, 6)
            cotangent[5:] = NAN
            found = with_cotangent(case, inputs, index, self.backend, cotangent)
            out, grad_x, grad_weight, *grads = found
            for x in (out, grad_x, grad_weight):
                assert not x[5:].any()
                assert x[:5].isfinite().all()
                assert x[:5].any()
            for x in grads:
                assert not x[1:].any()
                assert x[0].any()
                assert x[0].isfinite().all()

    @either
    def test_results_are_bitwise_equal_for_repeats_and_layouts(self, gated: bool) -> None:
        case = RoutedCase(30, 20, 18, 3, 2, load="dropped", gated=gated)
        inputs, index = case.inputs(torch.float16), case.index()
        expected = run(case, inputs, index, self.backend)
        layouts = (
            (inputs, index),
            ([torch.stack([x, x], dim=-1)[..., 0] for x in inputs], index.t().contiguous().t()),
            ([x.mT.contiguous().mT for x in inputs], index.int()),
            (fused(case, inputs) if gated else inputs, index),
        )
        for layout, places in layouts:
            found = run(case, layout, places, self.backend)
            for name, got, want in zip(case.names, found, expected, strict=True):
                assert torch.equal(got, want), name
        # One matrix for all experts, with a stride of 0.
        shared = [x[:1].expand_as(x) if i in (2, 6) else x for i, x in enumerate(inputs)]
        pair = [
            run(case, given, index, self.backend)
            for given in (shared, [x.contiguous() for x in shared])
        ]
        assert all(map(torch.equal, *pair))

    @either
    def test_opcheck(self, gated: bool) -> None:
        case = RoutedCase(4, 3, 2, 2, 1, gated=gated)
        _, offsets, permutation = dispatch(case.index(), 2, backend=self.backend)
        for dtype, bias in self.checked:
            x, weight, *parameters = case.inputs(dtype)
            parameters += [None] * (6 - len(parameters))
            parameters = [p if bias or i % 2 == 0 else None for i, p in enumerate(parameters)]
            tail = (*parameters, offsets, permutation, 0)
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            torch.library.opcheck(OPS.routed_mlp.default, (*leaves, *tail, True, self.backend))
            torch.library.opcheck(OPS.routed_mlp.default, (x, weight, *tail, False, self.backend))
            out, hidden = OPS.routed_mlp(x, weight, *tail, True, self.backend)
            given = (torch.ones_like(out), hidden, x, weight, *tail)
            wants = [True, True, *(p is not None for p in parameters)]
            for wanted in (wants, [*wants[:4], *[False] * 4]):
                torch.library.opcheck(
                    OPS.routed_mlp_backward.default, (*given, wanted, self.backend)
                )
