"""Tests of routed_mlp that every backend must pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.support.inputs import INF, NAN, draw
from tests.support.routed_cases import RoutedCase, run

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
    """Subclasses set a backend and activations whose formula is torch's at infinity."""

    backend: str
    acts: tuple[str, ...]
    acts: tuple[str, ...]

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
    def test_index_and_weights_of_other_layouts(self, gated: bool) -> None:
        """The weights are one matrix for all experts, with a stride of 0."""
        case = RoutedCase(30, 20, 18, 3, 2, load="dropped", gated=gated)
        inputs, index = case.inputs(torch.float16), case.index()
        shared = [x[:1].expand_as(x) if i in (2, 6) else x for i, x in enumerate(inputs)]
        expected = run(case, [x.contiguous() for x in shared], index, self.backend)
        for places in (index, index.t().contiguous().t(), index.int()):
            assert all(map(torch.equal, run(case, shared, places, self.backend), expected))
