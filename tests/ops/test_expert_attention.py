"""Tests of expert_attention against its float64 reference: values, gradients, masks, registration."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flmoe_kernels import expert_attention
from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.expert_attention.reference import attention_reference
from tests.support.attention_cases import DTYPES, LARGE, NAMES, SMALL, Case, check, run
from tests.support.attention_tests import AttentionTests
from tests.support.inputs import as_dtype, cumulative, draw, make_seed

OPS = torch.ops.flmoe


def test_uninitialised_memory_is_nan() -> None:
    """Negative control of all comparisons: outputs that are not written are detected."""
    like = torch.zeros(3)
    for x in (torch.empty(3), torch.empty_like(like), like.new_empty(3)):
        assert x.isnan().all()
    with pytest.raises(AssertionError, match="3 unexpected"):
        assert_within_budget(torch.empty(3), like, like.double(), "nothing")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    if dtype in (torch.bfloat16, torch.float16) and case in LARGE[2:]:
        pytest.skip("the large cases run in float32 and float64")
    check(case, dtype)


class TestCpu(AttentionTests):
    backend, heads, length = "cpu", 3, 150

    @pytest.fixture(params=DTYPES, ids=str)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param

    def test_extreme_scores_in_float64(self) -> None:
        check(Case((40, 150), 2, 8, scale=300.0), torch.float64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lengths", [(), (0,), (2, 1)])
def test_an_output_without_problems_still_has_a_gradient(
    backend: str, lengths: tuple[int, ...]
) -> None:
    q, k, v = (x.requires_grad_() for x in Case(lengths, 2, 4, tail=3).qkv(torch.float32))
    out = expert_attention(q, k, v, cumulative(lengths), backend=backend)
    assert out.requires_grad
    out.sum().backward()
    assert (v.grad[sum(lengths) :] == 0).all()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradcheck(p: float) -> None:
    case = Case((4, 0, 3), 2, 3, groups=2, lead=1)
    qkv = [x.requires_grad_() for x in case.qkv(torch.float64)]
    seed = make_seed() if p else None

    def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OPS.expert_attention(q, k, v, case.cu_seqlens, seed, p, 0.6)[0]

    def packed(qkv: Tensor) -> Tensor:
        return OPS.expert_attention_packed(qkv, case.cu_seqlens, seed, p, 0.6)[0]

    assert torch.autograd.gradcheck(split, qkv)
    assert torch.autograd.gradcheck(packed, [torch.stack(qkv, 2).detach().requires_grad_()])


def test_seed_governs_dropout() -> None:
    case = Case((20, 9), 2, 8, 0.5)
    q, k, v = case.qkv(torch.float32)

    def call() -> Tensor:
        return expert_attention(q, k, v, case.cu_seqlens, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    expert_attention(q, k, v, case.cu_seqlens)
    assert torch.equal(torch.get_rng_state(), state), "no dropout draws no seed"


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=5),
    heads=st.integers(1, 8),
    width=st.integers(1, 40),
    groups=st.sampled_from([None, 1, 2, 3]),
    lead=st.integers(0, 3),
    tail=st.integers(0, 3),
    p=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_any_shape(
    lengths: list[int],
    heads: int,
    width: int,
    groups: int | None,
    lead: int,
    tail: int,
    p: float,
) -> None:
    case = Case(tuple(lengths), heads, width, p, groups, lead, tail)
    _, _, oracle = check(case, torch.float64)
    # Among many random cases, some exceed the float32 error budget, so a fixed bound is used here.
    size = max(float(x.abs().max()) if x.numel() else 0.0 for x in oracle)
    qkv = as_dtype(case.qkv(torch.float64), torch.float32)
    for name, got, want in zip(NAMES, run(case, qkv, "cpu"), oracle, strict=True):
        assert got.shape == want.shape, name
        assert ((got - want).abs() <= 1e-4 * size).all(), name


def test_reference_is_a_softmax() -> None:
    """The oracle agrees with the textbook formula without dropout."""
    q, k, v = (draw(1, 7, 2, 3, dtype=torch.float64, seed=i) for i in range(3))
    out, lse = attention_reference(q, k, v, cumulative([4, 3]), None, 0.0, 0.5)
    for rows, head in itertools.product((slice(4), slice(4, 7)), (0, 1)):
        weights = torch.exp(0.5 * q[0, rows, head] @ k[0, rows, head].T)
        total = weights.sum(1, keepdim=True)
        torch.testing.assert_close(out[0, rows, head], weights / total @ v[0, rows, head])
        torch.testing.assert_close(lse[0, rows, head], total.log().squeeze(1))
