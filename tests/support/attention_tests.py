"""Tests of expert_attention that every backend must pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flmoe_kernels import expert_attention
from flmoe_kernels.core import dropout as rng
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from tests.support.attention_cases import NAMES, Case, check, run
from tests.support.inputs import INF, NAN, as_dtype, cumulative, gradients, make_seed

OPS = torch.ops.flmoe
FLOAT32, FLOAT64 = torch.float32, torch.float64
# Scores of a row: all but two keys have the first, the other two keys have the second and third.
SCORES = (
    (-INF, -INF, INF),
    (0.25, NAN, INF),
    (0.25, INF, NAN),
    (-INF, 0.5, -INF),
    (-INF, -INF, -INF),
    (0.25, INF, 0.5),
    (0.25, INF, INF),
    (0.25, INF, -INF),
    (0.25, -INF, -INF),
    (0.25, NAN, 0.5),
    (NAN, NAN, INF),
    (INF, INF, INF),
    (0.25, 0.5, 2.0),
)
EMPTY = (
    *(Case((), 2, 4, 0.5, groups, tail=tail) for groups in (None, 2) for tail in (0, 3)),
    Case((0, 0), 1, 3, groups=0),
)
# (length of the runs, rate)
MASKS = ((1, 0.5), (11, 0.0), (11, 0.1), (63, 0.5), (73, 0.5), (20, 0.999), (20, 1.0))


class AttentionTests:
    """Subclasses set a backend and its sizes, and have a fixture `dtype`."""

    backend: str
    heads: int
    # Length of the longest run: more than one block of keys.
    length: int

    def run(self, case: Case, qkv: list[Tensor], **options: object) -> list[Tensor]:
        return run(case, qkv, self.backend, **options)

    def test_a_wrong_result_fails(self, dtype: torch.dtype) -> None:
        """Negative control of all comparisons with the reference."""
        case = Case((9, 6, 20), self.heads, 16, 0.3)
        _, low, oracle = check(case, dtype, self.backend)
        q, k, v = qkv = case.qkv(dtype)
        wrong = {
            "another mask": self.run(case, qkv, seed=1),
            "no dropout": self.run(dataclasses.replace(case, p=0.0), qkv),
            "another rate": self.run(dataclasses.replace(case, p=0.31), qkv),
            "another scale": self.run(dataclasses.replace(case, scale=0.27), qkv),
            "runs shifted": self.run(case, qkv, cu_seqlens=cumulative([9, 7, 19])),
            "q and k swapped": self.run(case, [k, q, v]),
        }
        for mistake, results in wrong.items():
            for name, *triple in zip(NAMES, results, low, oracle, strict=True):
                assert_outside_budget(*triple, f"{name}: {mistake}")

    @pytest.mark.parametrize(("length", "p"), MASKS)
    def test_the_mask_is_the_generators(self, length: int, p: float, dtype: torch.dtype) -> None:
        """If v is the identity, the output has the probabilities, whose zeros are the mask; the gradient of v has
        them transposed."""
        heads, groups, problems = 2, 2, 2
        zeros = torch.zeros(groups, problems * length, heads, length, dtype=dtype)
        eye = torch.eye(length, dtype=dtype).view(length, 1, length).expand(-1, heads, -1)
        v = eye.repeat(groups, problems, 1, 1).requires_grad_()
        options = {"dropout_p": p, "seed": make_seed(), "backend": self.backend}
        out = expert_attention(zeros, zeros, v, cumulative([length] * problems), **options)
        (grad_v,) = torch.autograd.grad(out, v, v.detach())
        ids = torch.arange(groups * problems).view(groups, problems, 1, 1, 1)
        row, head = torch.arange(length).view(-1, 1, 1), torch.arange(heads).view(-1, 1)
        kept = rng.keep_mask(make_seed(), p, ids, head, row, torch.arange(length))
        assert torch.equal(out.view(kept.shape) != 0, kept)
        assert torch.equal(grad_v.view(kept.shape).transpose(2, 4) != 0, kept)
        if 0 < p < 0.9 and length > 1:
            for what, dim in (("groups", 0), ("problems", 1), ("heads", 3)):
                assert not torch.equal(kept, kept.roll(1, dim)), f"{what} share a mask"

    def test_uncovered_rows_get_zeros(self) -> None:
        case = Case((4, 0, 6), 2, 8, 0.5, groups=2, lead=3, tail=25)
        for result in self.run(case, case.qkv(FLOAT32)):
            assert (result[:, :3] == 0).all()
            assert (result[:, 13:] == 0).all()
            assert (result[:, 3:13] != 0).any()

    @pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # Triton's interpreter
    def test_infinite_and_nan_scores_act_as_in_torch(self, dtype: torch.dtype) -> None:
        """Log-sum-exp, and with dropout output and gradients; each problem has one row of SCORES, times 1, -1, 2
        or 1/2."""
        lengths = [self.length if i < 2 else 5 for i in range(len(SCORES))]
        case = Case(tuple(lengths), 1, 1, 0.5, scale=1.0)
        _, _, v = case.qkv(dtype)
        q = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=dtype).repeat(v.numel())[: v.numel()]
        k, expected = torch.empty_like(q), torch.empty_like(q, dtype=torch.float64)
        runs = zip(*(x.split(lengths) for x in (q, k, expected)), SCORES, strict=True)
        for queries, keys, statistics, (most, first, last) in runs:
            keys[:], keys[1], keys[-1] = most, first, last
            statistics[:] = torch.outer(queries.double(), keys.double()).logsumexp(dim=1)
        qkv = [q.view_as(v), k.view_as(v), v]
        _, lse = expert_attention(
            *qkv, case.cu_seqlens, scale=1.0, return_lse=True, backend=self.backend
        )
        expected = expected.to(lse.dtype).view_as(lse)
        assert all(kind(expected).any() for kind in (torch.isposinf, torch.isneginf, torch.isnan))
        torch.testing.assert_close(lse, expected, equal_nan=True)

        unit = 64 * torch.finfo(dtype).eps
        found, want = self.run(case, qkv), run(case, qkv, "reference")
        for name, got, each in zip(NAMES, found, want, strict=True):
            assert each.isnan().any(), name
            assert each.isfinite().any(), name
            torch.testing.assert_close(got, each, rtol=unit, atol=unit, equal_nan=True)

    @pytest.mark.parametrize("case", EMPTY, ids=str)
    def test_no_rows_and_no_problems(self, case: Case) -> None:
        q, k, v = case.qkv(FLOAT32)
        for backend in (self.backend, "reference"):
            for result, x in zip(run(case, [q, k, v], backend), (q, q, k, v), strict=True):
                assert result.shape == x.shape
                assert (result == 0).all()

    def test_packed_equals_unpacked(self, dtype: torch.dtype) -> None:
        case = Case((5, 0, self.length // 5), self.heads, 6, 0.5, groups=2, lead=1, tail=2)
        plain = case.qkv(dtype)
        expected = self.run(case, plain)
        qkv = torch.stack(plain, dim=2).requires_grad_()
        tail = (case.cu_seqlens, make_seed(), 0.5, 6**-0.5, self.backend)
        out, lse = OPS.expert_attention_packed(qkv, *tail)
        (grad,) = gradients([out], [qkv])
        for name, got, want in zip(NAMES, (out, *grad.unbind(2)), expected, strict=True):
            assert torch.equal(got, want), name
        assert torch.equal(lse, OPS.expert_attention(*plain, *tail)[1])

    @pytest.mark.parametrize("groups", [None, 2])
    def test_log_sum_exp(self, groups: int | None, dtype: torch.dtype) -> None:
        case = Case((9, 0, self.length), 2, 8, groups=groups, lead=2, tail=1)
        qkv = [x.requires_grad_() for x in case.qkv(dtype)]
        wide = as_dtype(qkv, FLOAT64)
        found = []
        for backend, inputs in ((self.backend, qkv), ("reference", qkv), ("reference", wide)):
            pair = expert_attention(*inputs, case.cu_seqlens, return_lse=True, backend=backend)
            assert not pair[1].requires_grad
            found.append(pair[1])
        assert found[0].dtype == (FLOAT64 if dtype == FLOAT64 else FLOAT32)
        assert found[0].shape == qkv[0].shape[:-1]
        assert_within_budget(*found, "lse")
        assert_outside_budget(found[0] + 0.1, *found[1:], "lse")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_nan_and_inf_propagate(self, value: float, which: int, dtype: torch.dtype) -> None:
        case = Case((6, 9, self.length), 1, 5, groups=1)
        qkv = [x.abs() + 0.1 for x in case.qkv(dtype)]
        qkv[which][0, 8, 0, 2] = value
        actual, low = self.run(case, qkv), run(case, qkv, "reference")
        oracle = run(case, as_dtype(qkv, FLOAT64), "reference")
        assert_within_budget(actual[0], low[0], oracle[0], "out")
        assert actual[0][:, :6].isfinite().all()
        assert actual[0][:, 15:].isfinite().all()
        assert not all(result.isfinite().all() for result in actual)
        for name, got, want in zip(NAMES, actual, oracle, strict=True):
            assert torch.equal(got.isfinite(), want.isfinite()), name

    def test_a_block_of_minus_infinity_does_not_hide_later_keys(self) -> None:
        """Scores of -inf have probability 0 in any block of keys."""
        length = 2 * self.length
        case = Case((length,), 1, 4)
        q, k, v = (x.abs() + 0.1 for x in case.qkv(FLOAT32))
        middle = length // 2
        for first, last in ((0, 5), (0, middle), (middle - 20, middle + 64), (length - 1, length)):
            hidden = k.clone()
            hidden[first:last, 0, 1] = -float("inf")
            pair = [run(case, [q, hidden, v], name)[0] for name in (self.backend, "reference")]
            oracle = run(case, as_dtype([q, hidden, v], FLOAT64), "reference")[0]
            assert oracle.isfinite().all()
            assert_within_budget(*pair, oracle, f"keys {first} to {last} at -inf")

    def test_extreme_scores(self) -> None:
        """For scores far outside the range of exp, the maximum is subtracted first, and keys past the last one
        get probability 0."""
        case = Case((40, self.length), self.heads, 8, scale=300.0)
        q, k, v = case.qkv(FLOAT32)
        for inputs in ([q, k, v], [q.abs(), -k.abs(), v]):
            for result in self.run(case, inputs):
                assert result.isfinite().all()
