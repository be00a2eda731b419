"""Tests of the encoder's operators that every backend must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core import dropout as rng
from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.ops.encoder import reference
from tests.support.encoder_cases import (
    identity_mlp,
    mlp_arguments,
    norm_arguments,
    operator_calls,
)
from tests.support.inputs import as_dtype, cumulative, draw, make_seed
from tests.support.operator_cases import (
    EPS,
    OPS,
    Operator,
    compare,
    evaluate,
    reference_losses,
    tensors,
)

# Number, rows, width and dtype of a call.
Size = tuple[int, int, int, torch.dtype]


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype.is_floating_point


# (experts, rows of a view, width, rate)
MASKS = (
    *((2, 2, 63, 0.3), (1, 1, 1030, 0.99), (2, 3, 300, 0.5), (1, 2, 300, 0.999)),
    *((2, 2, 17, 0.0), (1, 2, 17, 1.0), (1, 2, 17, 0.1), (1, 34, 2, 0.5)),
)
DROPPING = tuple(
    name + suffix
    for name in ("dropout_add_norm", "dropout_add_pool")
    for suffix in ("", "_backward")
)
SUMS = ("expert_linear", "expert_norm", "expert_mlp")


class EncoderTests:
    """Subclasses set a backend, the rows and width of most calls, and dtypes without rounding to half precision;
    they have fixtures `dtype` and `size`. exhaustive: every size with all options instead of one of them."""

    backend: str
    rows: int
    width: int
    precise: tuple[torch.dtype, ...]
    exhaustive: bool
    # Rows of expert_linear, expert_norm and expert_mlp: more than a single sum takes.
    many: tuple[int, int, int]

    def operator(self, name: str) -> Operator:
        return lambda *arguments: getattr(OPS, name)(*arguments, self.backend)

    def calls(self, p: float) -> dict[str, list[Any]]:
        return operator_calls(torch.float32, p, width=self.width)

    def compare(self, name: str, arguments: list[Any], dtype: torch.dtype, **options: Any) -> Any:
        return compare(self.operator(name), getattr(reference, name), arguments, dtype, **options)

    def some(self, size: Size, *options: Any) -> tuple[Any, ...]:
        return options if self.exhaustive else options[size[0] % len(options) :][:1]

    def test_expert_norm(self, size: Size) -> None:
        _, rows, width, dtype = size
        _, x, gain, shift, *_ = norm_arguments(rows, width, 0.0, False)
        for eps in self.some(size, EPS, 0.1):
            # With one column the norm is only its shift.
            self.compare("expert_norm", [x, gain, shift, eps], dtype, may_vanish=width == 1)

    def test_dropout_add_norm(self, size: Size) -> None:
        _, rows, width, dtype = size
        ways = ((0.5, True), (0.3, False), (0.0, True), (0.5, False), (0.0, False))
        for p, residual in self.some(size, *ways):
            # Rows with one column, or dropped completely, have variance 0, which half precision does not keep.
            if width >= (16 if p else 2) or dtype in self.precise:
                arguments = norm_arguments(rows, width, p, residual)
                options = {"outputs": 2, "may_vanish": width == 1}
                self.compare("dropout_add_norm", arguments, dtype, **options)

    def test_expert_mlp(self, size: Size) -> None:
        _, rows, width, dtype = size
        for p in self.some(size, 0.5, 0.0, 1.0):
            for hidden, out in self.some(size, (width + 3, width), (5, 17)):
                arguments = mlp_arguments(2, rows, (width, hidden, out), p, scale=3)
                self.compare("expert_mlp", arguments, dtype)

    def test_dropout_add_pool(self, size: Size) -> None:
        _, rows, width, dtype = size
        views, part = 2 + self.exhaustive, rows // 3
        x, update = (draw(2, views * rows, width, seed=i) for i in (1, 2))
        for p in self.some(size, 0.5, 0.0):
            seed = make_seed() if p else None
            for runs in self.some(size, [part, 0, rows - part], [part, part], [0]):
                arguments = [x, update, cumulative(runs), views, seed, p]
                self.compare("dropout_add_pool", arguments, dtype)

    def test_no_segments(self) -> None:
        rows = draw(2, 6, 4).requires_grad_()
        out = self.operator("dropout_add_pool")(rows, rows, cumulative([]), 2, make_seed(), 0.5)
        assert out.shape == (2, 2, 0, 4)
        (grad,) = torch.autograd.grad(out, rows, out.detach())
        assert (grad == 0).all()

    def test_expand_views(self, size: Size) -> None:
        _, rows, width, dtype = size
        for modalities in self.some(size, 2, 5):
            modality = (torch.arange(rows) % modalities).to(torch.int32)
            arguments = [draw(2, 2, rows, width), modality, modalities + 1]
            results = self.compare("expand_views", arguments, dtype)
            assert torch.equal(results[0][0], results[0][1]), "a copy has no rounding"

    @pytest.mark.parametrize("name", SUMS)
    def test_sums_over_many_rows(self, name: str) -> None:
        """Gradients of weights are sums over all tokens and views; their rounding error must not grow with the
        number. All rows have the same gradient, as after mean pooling, so that nothing cancels."""
        rows, width = self.many[SUMS.index(name)], 16
        cotangent = draw(1, 1, width, seed=4).expand(1, rows, width)
        x, weight = draw(1, rows, width), draw(1, width, width, seed=1)
        bias = draw(1, width, seed=2)
        arguments = {
            "expert_linear": [x, weight, bias],
            "expert_norm": [x, weight[:, 0], bias, EPS],
            "expert_mlp": [x, weight, bias, weight.mT, bias, make_seed(), 0.5],
        }[name]
        found = []
        for operator, dtype in (
            (self.operator(name), torch.float32),
            (getattr(reference, name), torch.float32),
            (getattr(reference, name), torch.float64),
        ):
            inputs = as_dtype(arguments, dtype, requires_grad=True)
            leaves = [each for each in inputs if is_float(each)]
            out = tensors(operator(*inputs))[0]
            found.append(torch.autograd.grad(out, leaves, cotangent.to(dtype)))
        for i, triple in enumerate(zip(*found, strict=True)):
            assert_within_budget(*triple, f"gradient {i} of {name}")

    def test_wrong_results_fail(self, dtype: torch.dtype) -> None:
        """Negative control of all comparisons with references: another mask, operand or run."""
        norm = norm_arguments(self.rows, 64, 0.5, True)
        half = self.rows // 2
        pool: list[Any] = [norm[1], norm[0], cumulative([half, half]), 1, make_seed(), 0.5]
        x, weight, bias = draw(2, 9, 64), draw(2, 64, 64, seed=1), draw(2, 64, seed=2)
        # (arguments, wrong arguments, number of outputs, checked results)
        calls: dict[str, tuple[list[Any], list[list[Any]], int, int]] = {
            "dropout_add_norm": (
                norm,
                [
                    [*norm[:4], make_seed(1), 0.5, EPS],
                    [norm[1], norm[0], *norm[2:]],
                    [None, *norm[1:]],
                    [*norm[:4], None, 0.0, EPS],
                ],
                *(2, 2),
            ),
            "dropout_add_pool": (
                pool,
                [[*pool[:2], cumulative([half + 1, half - 1]), *pool[3:]]],
                *(1, 3),
            ),
            "expert_linear": (
                [x, weight, bias],
                [[x, weight.mT, bias], [x, weight, None], [x, weight.flip(0), bias]],
                *(1, 1),
            ),
        }
        for name, (arguments, mistakes, outputs, checked) in calls.items():
            operator = self.operator(name)
            triples = compare(operator, getattr(reference, name), arguments, dtype, outputs)
            for wrong in mistakes:
                results = evaluate(operator, as_dtype(wrong, dtype, True), outputs)
                for got, (_, low, oracle) in zip(results[:checked], triples[:checked], strict=True):
                    assert_outside_budget(got, low, oracle, name)

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("residual", [True, False])
    def test_dropout_add_norm_with_one_result_used(self, which: int, residual: bool) -> None:
        arguments = norm_arguments(self.rows, 20, 0.3, residual)
        pair = self.operator("dropout_add_norm"), reference.dropout_add_norm
        first, second = (lambda *args, op=op: op(*args)[which] for op in pair)
        compare(first, second, arguments, torch.float32, may_vanish=which == 0)

    @pytest.mark.parametrize("active", [True, False])
    def test_triplet_margin(self, active: bool) -> None:
        """Inside the margin the loss is distance - distance + 1; outside, it and its gradient are 0."""
        latents = torch.zeros(4, 3, 1, 4)
        latents[:, 1, 0, 0], latents[:, 2, 0, 0] = 1.0, 1.5 if active else 2.5
        # Expert 0's negative is view 1 and its positive view 2; expert 1 has them swapped.
        expected = torch.tensor([1.5, 0.5] if active else [2.5, 0.0])
        for dtype in self.precise:
            found = compare(
                self.operator("interaction_losses"), reference_losses, [latents, None], dtype
            )
            (result, *_), (grad, *_) = found
            torch.testing.assert_close(result[:2], expected.to(dtype), atol=1e-6, rtol=0)
            assert bool((grad[1] != 0).any()) == active

    def test_losses_of_zero_latents_and_identical_views(self) -> None:
        shape = (5, 4, 3, 6)
        zero_view, zero_anchor, zero_sample = (draw(*shape, seed=seed) for seed in (1, 2, 3))
        zero_view[:, 2] = zero_anchor[:, 0] = zero_sample[:, :, 1] = 0
        same_views = draw(5, 1, 3, 6, seed=4).expand(shape)
        for dtype in self.precise:
            for latents in (zero_view, zero_anchor, zero_sample, same_views, torch.zeros(shape)):
                compare(
                    self.operator("interaction_losses"), reference_losses, [latents, None], dtype
                )

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_inf_propagate(self, value: float) -> None:
        for name, arguments in self.calls(0.0).items():
            arguments = as_dtype(arguments, torch.float32)
            target = arguments[0] if arguments[0] is not None else arguments[1]
            target.view(-1)[1] = value
            stem = name.split()[0]
            oracle = reference_losses if stem == "interaction_losses" else getattr(reference, stem)
            got = tensors(self.operator(stem)(*arguments))[0]
            want = tensors(oracle(*as_dtype(arguments, torch.float64)))[0]
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(got), kind(want)), name
            assert not got.isfinite().all(), name

    def test_gelu_over_its_whole_range(self, dtype: torch.dtype) -> None:
        """Pointwise errors, relative to the value if it is large and to the tail if it vanishes."""
        if dtype in (torch.bfloat16, torch.float16):
            pytest.skip("the results are rounded")
        far = torch.tensor([1e-30, -1e-30, 0.0, 50, -50, 1e25, -1e25, 3e38, -3e38])
        points = torch.cat([torch.linspace(-14, 14, 5601), far])
        x = points.to(dtype).view(1, -1, 1).requires_grad_()
        out, _ = self.operator("expert_mlp")(*identity_mlp(x), None, 0.0)
        (grad,) = torch.autograd.grad(out.sum(), x)
        x64 = x.detach().double().requires_grad_()
        exact = x64 * 0.5 * torch.special.erfc(-x64 / 2**0.5)
        (exact_grad,) = torch.autograd.grad(exact.sum(), x64)
        eps = torch.finfo(dtype).eps
        # Near its zeros the gradient is the difference of two terms of this size.
        for got, want, size in ((out, exact, 0.1), (grad, exact_grad, 0.25)):
            bound = 8 * eps * want.abs().clamp_min(size if dtype == torch.float32 else 4.0)
            assert ((got - want).abs() <= bound).all()
            assert not ((got * (1 + 1e-5) - want).abs() <= bound).all()
        # The relative error stays small in the left tail too, where x * 0.5 * (1 + erf) cancels.
        tail = (x64 < -1) & (x64 > -9)
        limit = 2e-5 if dtype == torch.float32 else 1e-12
        assert ((out - exact).abs()[tail] <= limit * exact.abs()[tail]).all()

    @pytest.mark.parametrize(("experts", "rows", "width", "p"), MASKS)
    def test_masks_are_the_generators(
        self, experts: int, rows: int, width: int, p: float, dtype: torch.dtype
    ) -> None:
        """Masks agree bitwise, forward and backward, in every operator with dropout; rows are numbered across
        views, so that views do not share masks."""
        seed, views, wants = make_seed(), 2, [True] * 4
        at = torch.arange(experts).view(-1, 1, 1), torch.arange(views * rows).view(-1, 1)
        first, second = (rng.keep_mask(seed, p, i, *at, torch.arange(width)) for i in (0, 1))
        shape = (experts, views * rows, width)
        ones, zeros = torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        gain, scale = torch.ones(experts, width, dtype=dtype), rng.keep_scale(p)
        statistics = torch.ones(shape[:2], dtype=statistics_dtype(dtype))
        norm = (ones, gain, gain, seed, p, EPS)
        backward = (ones, None, zeros, statistics, statistics, gain, seed, p)
        runs = cumulative([1] * rows)
        call = {name: self.operator(name) for name in DROPPING}
        pooled = call["dropout_add_pool"](zeros, ones, runs, views, seed, p)
        tail = (runs, views, views * rows, seed, p, wants[:2])
        scaled = (
            call["dropout_add_norm"](zeros, *norm)[0],
            call["dropout_add_norm_backward"](*backward, False, wants)[1],
            pooled.view(shape),
            call["dropout_add_pool_backward"](torch.ones_like(pooled), *tail)[1],
        )
        # Triton's interpreter truncates to half precision.
        unit = 4 * torch.finfo(dtype).eps
        kept, again = first.double(), second.double()
        for got in scaled:
            assert torch.equal(got != 0, first & (scale > 0))
            tolerance = 0 if self.backend == "cpu" else unit
            torch.testing.assert_close(got, (kept * scale).to(dtype), rtol=tolerance, atol=0)
        x = zeros.clone().requires_grad_()
        mlp = self.operator("expert_mlp")
        (grad,) = torch.autograd.grad(mlp(*identity_mlp(x), seed, p)[0], x, ones)
        for got in (mlp(*identity_mlp(ones), seed, p)[0], grad):
            assert torch.equal(got != 0, first)
        # Without a residual, dropout is applied to the update twice.
        twice = (kept * scale * (1 + again * scale)).to(dtype)
        sums = call["dropout_add_norm"](None, *norm)[0]
        grad = call["dropout_add_norm_backward"](*backward, True, wants)[1]
        for got in (sums, grad):
            torch.testing.assert_close(got, twice, rtol=unit, atol=0)
        assert not torch.equal(first, second) or p in (0.0, 1.0)
