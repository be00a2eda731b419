"""Tests of the fused steps of an encoder layer on their Triton kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget
from flmoe_kernels.ops.encoder import reference, triton
from flmoe_kernels.ops.encoder.steps import Fused, Saved, Stream, Weights, steps_of
from tests.support.inputs import draw, make_seed
from tests.support.operator_cases import EPS, compare

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
EXPERTS, NONE = 2, torch.empty(0)


@dataclass(frozen=True)
class Case:
    """Two blocks of rows, the second with a ragged edge; p: rates before, within and after the MLP."""

    rows: int
    width: int
    hidden: int
    p: tuple[float, float, float] = (0.5, 0.3, 0.5)
    self_residual: bool = False

    def drops(self) -> list[tuple[Tensor | None, float]]:
        return [(make_seed(i) if p else None, p) for i, p in enumerate(self.p)]

    def inputs(self) -> list[Tensor]:
        """residual, branch, gain, shift, w_in, b_in, w_out, b_out"""
        d, f = self.width, self.hidden
        shapes = [(self.rows, d)] * 2 + [(d,)] * 2 + [(f, d), (f,), (d, f), (d,)]
        scales = [1.0] * 4 + [d**-0.5, 1.0, f**-0.5, 1.0]
        found = [
            draw(EXPERTS, *shape, seed=i, scale=scale)
            for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
        ]
        return [None, *found[1:]] if self.self_residual else found  # type: ignore[list-item]


class MlpStep(torch.autograd.Function):
    """The step after the attention, whose projection is an identity."""

    @staticmethod
    def forward(ctx: Any, case: Case, *inputs: Tensor) -> Tensor:
        residual, branch, *parameters = inputs
        eye = torch.eye(case.width, dtype=branch.dtype).repeat(EXPERTS, 1, 1)
        weights = Weights(NONE, NONE, NONE, eye, torch.zeros_like(parameters[1]), *parameters)
        steps = Fused(triton, EPS, case.self_residual)
        kept, out = steps.mlp(residual, branch, weights, case.drops(), {}, True)
        assert out.update is None
        ctx.kept = case, steps, weights, Saved(*7 * (NONE,), *kept)
        return out.residual

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        case, steps, weights, saved = ctx.kept
        wants = ctx.needs_input_grad[1:]
        grads = grad, reference.dropout(grad, *case.drops()[2]).contiguous()
        found = steps.mlp_backward(grads, saved, weights, case.drops(), wants, {})
        if not case.p[0] and not case.self_residual:
            found = (found[0], found[0], *found[2:])
        return None, *(x if want else None for x, want in zip(found, wants, strict=True))


def mlp_step(case: Case, *inputs: Tensor) -> Tensor:
    residual, branch, gain, shift, *mlp = inputs
    before, within, after = case.drops()
    total, normed = reference.dropout_add_norm(residual, branch, gain, shift, *before, EPS)
    return total + reference.dropout(reference.expert_mlp(normed, *mlp, *within), *after)


class QkvStep(torch.autograd.Function):
    """The step before the attention; returns also its input, residual + dropout(update)."""

    @staticmethod
    def forward(ctx: Any, case: Case, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        residual, update, gain, shift, weight = inputs
        total = residual + reference.dropout(update, *case.drops()[0])
        weights = Weights(gain, shift, weight, *8 * (NONE,))
        steps = Fused(triton, EPS, False)
        kept, out = steps.qkv(Stream(total), weights, {})
        ctx.kept = case, steps, weights, Saved(*kept, *8 * (NONE,))
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        case, steps, weights, saved = ctx.kept
        wants, drop = ctx.needs_input_grad[1:], case.drops()[0]
        grads = tuple(grad.contiguous() for grad in grads)
        found = steps.qkv_backward(grads, saved, weights, drop, wants, {})
        if not case.p[0]:
            found = (found[0], found[0], *found[2:])
        return None, *(x if want else None for x, want in zip(found, wants, strict=True))


def qkv_step(case: Case, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    residual, update, gain, shift, weight = inputs
    total, normed = reference.dropout_add_norm(residual, update, gain, shift, *case.drops()[0], EPS)
    return total, reference.expert_linear(normed, weight, None)


STEPS: dict[str, tuple[Any, Any, int]] = {
    "mlp": (MlpStep.apply, mlp_step, 1),
    "qkv": (QkvStep.apply, qkv_step, 2),
}


def arguments(step: str, case: Case) -> list[Any]:
    inputs = case.inputs()
    if step == "qkv":
        weight = draw(EXPERTS, 3 * case.width, case.width, seed=9, scale=case.width**-0.5)
        inputs = [*inputs[:4], weight]
    return [case, *inputs]


# Tiles of 64 and 128 rows, steps of the loops of 16, 32 and 64.
CASES = (
    (Case(70, 16, 48), BFLOAT16),
    (Case(9, 32, 32, (0.0, 0.3, 0.0)), FLOAT16),
    (Case(65, 128, 64, (0.3, 0.0, 0.5)), BFLOAT16),
    (Case(131, 256, 64), FLOAT16),
    (Case(40, 64, 192, (0.5, 0.5, 0.0), self_residual=True), BFLOAT16),
    (Case(0, 16, 16), BFLOAT16),
    (Case(70, 32, 64), FLOAT32),
)


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_matches_the_reference(step: str, case: Case, dtype: torch.dtype) -> None:
    if step == "mlp" or not case.self_residual:
        fused, plain, outputs = STEPS[step]
        compare(fused, plain, arguments(step, case), dtype, outputs)


@pytest.mark.parametrize("step", STEPS)
def test_other_masks_fail(step: str) -> None:
    """Control of the comparison above."""
    fused, plain, outputs = STEPS[step]
    case, wrong = Case(30, 32, 32, (0.5, 0.0, 0.0)), Case(30, 32, 32, (0.25, 0.0, 0.0))
    triples = compare(fused, plain, arguments(step, case), BFLOAT16, outputs)
    inputs = [x.bfloat16() for x in arguments(step, case)[1:]]
    result = fused(wrong, *inputs)
    _, low, exact = triples[0]
    assert_outside_budget(result[0] if outputs > 1 else result, low, exact, step)


def gradients(step: str, case: Case, wants: Sequence[bool]) -> list[Tensor]:
    inputs = [
        x.bfloat16().requires_grad_(want)
        for x, want in zip(arguments(step, case)[1:], wants, strict=True)
    ]
    out = STEPS[step][0](case, *inputs)
    out = out if isinstance(out, Tensor) else torch.cat(out, -1)
    return list(torch.autograd.grad(out.square().sum(), [x for x in inputs if x.requires_grad]))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("step", STEPS)
def test_gradients_of_some_inputs_are_those_of_all(step: str, p: float) -> None:
    case = Case(9, 16, 16, (p, 0.5, 0.5))
    count = len(arguments(step, case)) - 1
    complete = gradients(step, case, [True] * count)
    for wants in itertools.chain(
        ([i == j for i in range(count)] for j in range(count)),
        ([i >= j for i in range(count)] for j in range(count)),
    ):
        want = [x for x, wanted in zip(complete, wants, strict=True) if wanted]
        assert all(map(torch.equal, gradients(step, case, wants), want)), wants


@pytest.mark.parametrize(
    ("dtype", "width", "hidden", "fused"),
    [
        (BFLOAT16, 256, 512, True),
        (FLOAT16, 16, 16, True),
        (FLOAT32, 256, 512, False),
        (BFLOAT16, 512, 512, False),
        (BFLOAT16, 192, 512, False),
        (BFLOAT16, 8, 16, False),
        (BFLOAT16, 128, 200, False),
    ],
)
def test_widths_that_have_fused_steps(
    dtype: torch.dtype, width: int, hidden: int, fused: bool
) -> None:
    rows = torch.empty(1, width, dtype=dtype)
    assert steps_of(triton, rows, hidden).fused == fused
