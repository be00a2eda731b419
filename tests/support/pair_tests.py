"""Tests of pair_moe that every backend must pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flmoe_kernels import pair_moe
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.ops.pair_moe.kinds import DEFAULT_KINDS, KINDS
from tests.support.inputs import SPECIAL_LOGITS, as_dtype, draw, gradients
from tests.support.pair_cases import NAMES, REDUCTIONS, PairCase, check, run

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
PAIRED = [*zip((FLOAT32, BFLOAT16, FLOAT16), REDUCTIONS, strict=True)]
BASE = PairCase(9, 14)
LEAST = torch.finfo(FLOAT32).min
paired = pytest.mark.parametrize(("dtype", "reduce"), PAIRED, ids=str)


class PairTests:
    """Subclasses set a backend, its widest dtype, columns of a long side, and (reduction, top_k) of calls."""

    backend: str
    widest: torch.dtype
    columns: int
    calls: tuple[tuple[str, int | None], ...]

    @paired
    def test_a_wrong_result_fails(self, dtype: torch.dtype, reduce: str) -> None:
        """Negative control of all comparisons: other kinds, missing columns, an error of a thousandth."""
        case = dataclasses.replace(BASE, reduce=reduce)
        results, low, oracle = check(case, dtype, self.backend)
        inputs, factor = case.inputs(dtype), 1.001 if dtype == FLOAT32 else 1.2
        swapped = dataclasses.replace(case, kinds=("unique_b", "unique_a", *DEFAULT_KINDS[2:]))
        other = run(swapped, inputs, self.backend)
        short = run(dataclasses.replace(case, masks="b"), inputs, self.backend)
        for i, (name, *pair) in enumerate(zip(NAMES, low, oracle, strict=True)):
            assert_outside_budget(short[i], *pair, f"{name}: missing columns")
            assert_outside_budget(results[i] * factor, *pair, f"{name}: larger")
            if name != "mass":
                assert_outside_budget(other[i], *pair, f"{name}: kinds swapped")

    @paired
    def test_padding_is_not_read(self, dtype: torch.dtype, reduce: str) -> None:
        """Values of masked tokens do not change any bit of the results, and their gradients are zero."""
        case = PairCase(
            20, 18, masks="sample", reduce=reduce, top_k=3 if reduce == "none" else None
        )
        inputs, options = case.inputs(dtype), case.options()
        masks = [~options[name] for name in ("mask_a", "mask_b") * 2]
        for backend in (self.backend, "reference"):
            expected = run(case, inputs, backend)
            for value in (float("nan"), float("inf")):
                dirty = [x.clone() for x in inputs]
                for x, mask in zip(dirty, masks, strict=False):
                    x.masked_fill_(mask[:, None, :, None], value)
                for name, got, want in zip(NAMES, run(case, dirty, backend), expected, strict=True):
                    assert torch.equal(got, want), name
            for name, grad, mask in zip(NAMES[2:], expected[2:], masks, strict=False):
                assert not grad.transpose(1, 2)[mask].any(), name

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("which", range(5))
    def test_nan_and_inf_propagate(self, which: int, value: float) -> None:
        for reduce, top_k in self.calls:
            case = PairCase(30, self.columns, kinds=KINDS, reduce=reduce, top_k=top_k)
            inputs = [x.abs() + 0.1 for x in case.inputs(FLOAT32)]
            # The value is in the synergy expert, which uses all inputs.
            inputs[which][(0, 2, 1, 2) if which < 4 else 2] = value
            actual, low = run(case, inputs, self.backend), run(case, inputs, "reference")
            oracle = run(case, as_dtype(inputs, torch.float64), "reference")
            for name, *triple in zip(NAMES[:2], actual, low, oracle, strict=False):
                assert_within_budget(*triple, name)
            assert which == 4 or not all(x.isfinite().all() for x in actual)
            for name, got, want in zip(NAMES, actual, oracle, strict=True):
                assert torch.equal(got.isfinite(), want.isfinite()), name

    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    @pytest.mark.parametrize(
        ("logit", "bias"),
        # Products and biases whose multiples by log2(e) do not add up to equal logits; the least float32.
        [(0.0, (0.0,) * 4), (-7.0, (0.0, -6.0, 5.0, -3.0)), (LEAST, (LEAST,) * 4)],
        ids=["products", "biases", "least"],
    )
    def test_equal_logits_select_the_lower_experts(
        self, logit: float, bias: tuple[float, ...], top_k: int
    ) -> None:
        a, c = draw(1, 4, 2, 3, seed=1), draw(1, 4, 3, 3, seed=2)
        gate_bias = torch.tensor(bias)
        q, k = torch.ones(1, 4, 2, 1), (logit - gate_bias).view(1, 4, 1, 1).expand(1, 4, 3, 1)
        options = {"kinds": DEFAULT_KINDS, "top_k": top_k, "reduce": "pool"}
        for backend in (self.backend, "reference"):
            mass = pair_moe(q, k, a, c, gate_bias=gate_bias, backend=backend, **options).mass
            assert torch.allclose(mass[0, :top_k], torch.tensor(3.0 / top_k))
            assert not mass[0, top_k:].any()

    @pytest.mark.parametrize("reduce", REDUCTIONS)
    @pytest.mark.parametrize("index", [0, 1])
    def test_one_output_alone_has_gradients(self, index: int, reduce: str) -> None:
        """y or mass alone has gradients, with an expanded upstream gradient."""
        leaves = [x.detach().requires_grad_() for x in BASE.inputs(self.widest)]
        options = {"gate_bias": leaves[4], "kinds": KINDS[:4], "reduce": reduce}
        results = []
        for backend in (self.backend, "reference"):
            out = pair_moe(*leaves[:4], backend=backend, **options)
            results.append(torch.autograd.grad(out[index].sum(), leaves, allow_unused=True))
        tolerance = 1e-7 if self.widest == torch.float64 else 1e-4
        for got, want in zip(*results, strict=True):
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
    def test_a_bias_of_full_precision_beside_half_inputs(self, dtype: torch.dtype) -> None:
        inputs, bias = BASE.inputs(dtype)[:4], draw(4, seed=4).requires_grad_()
        results = []
        for backend in (self.backend, "reference"):
            y, mass = pair_moe(*inputs, kinds=DEFAULT_KINDS, gate_bias=bias, backend=backend)
            results.append([mass, *gradients([mass], [bias])])
            assert (y.dtype, mass.dtype) == (dtype, FLOAT32)
            assert results[-1][1].dtype == FLOAT32
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    def test_infinite_and_nan_logits_act_as_in_torch(self, top_k: int) -> None:
        """One pair per sample, so that the mass is the pair's probability."""
        logits = torch.tensor(SPECIAL_LOGITS)
        shape = (*logits.shape, 1)
        case = PairCase(1, 1, 1, 3, batch=len(logits), bias=False, top_k=top_k)
        inputs = [torch.ones(*shape, 1), logits.view(*shape, 1)]
        inputs += [draw(*shape, 3, seed=i) for i in range(2)]
        found, expected = (run(case, inputs, backend) for backend in (self.backend, "reference"))
        if top_k == 4:
            torch.testing.assert_close(
                expected[1].flatten(1), logits.softmax(dim=1), equal_nan=True
            )
        for name, got, want in zip(NAMES, found, expected, strict=False):
            torch.testing.assert_close(
                got, want, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
