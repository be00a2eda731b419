"""expert_attention against its float64 reference: values, gradients, masks, edges, registration."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flmoe_kernels import expert_attention
from flmoe_kernels.core import dropout as rng
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.ops.expert_attention.reference import attention_reference
from tests.support.attention_cases import DTYPES, LARGE, NAMES, SMALL, Case, check, run
from tests.support.inputs import as_dtype, cumulative, draw, gradients, make_seed

OPS = torch.ops.flmoe


def test_uninitialised_memory_is_poisoned() -> None:
    """The control of every comparison: an output that is not written shows."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_result_fails(dtype: torch.dtype) -> None:
    case = Case((9, 6, 20), 2, 16, 0.3)
    _, low, oracle = check(case, dtype)
    qkv = case.qkv(dtype)
    wrong = {
        "another mask": run(case, qkv, "cpu", seed=1),
        "no dropout": run(dataclasses.replace(case, p=0.0), qkv, "cpu"),
        "another rate": run(dataclasses.replace(case, p=0.31), qkv, "cpu"),
        "another scale": run(dataclasses.replace(case, scale=0.27), qkv, "cpu"),
        "runs shifted": run(case, qkv, "cpu", cu_seqlens=torch.tensor([0, 9, 16, 35]).int()),
        "q and k swapped": run(case, [qkv[1], qkv[0], qkv[2]], "cpu"),
    }
    for reason, results in wrong.items():
        for name, *found in zip(NAMES, results, low, oracle, strict=True):
            assert_outside_budget(*found, f"{name}: {reason}")


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("length", [1, 63, 130, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_mask_is_the_generators(p: float, length: int, dtype: torch.dtype) -> None:
    """With v the identity the output holds the probabilities, and its zeros are the mask."""
    heads, groups, problems = 2, 2, 2
    cu = cumulative([length] * problems)
    zeros = torch.zeros(groups, problems * length, heads, length, dtype=dtype)
    eye = torch.eye(length, dtype=dtype).view(length, 1, length).expand(-1, heads, -1)
    v = eye.repeat(groups, problems, 1, 1).requires_grad_()
    out = expert_attention(zeros, zeros, v, cu, dropout_p=p, seed=make_seed(), backend="cpu")
    assert isinstance(out, Tensor)
    (grad_v,) = torch.autograd.grad(out, v, v.detach())
    ids = torch.arange(groups * problems).view(groups, problems, 1, 1, 1)
    row, head = torch.arange(length).view(-1, 1, 1), torch.arange(heads).view(-1, 1)
    kept = rng.keep_mask(make_seed(), p, ids, head, row, torch.arange(length))
    assert torch.equal(out.view(kept.shape) != 0, kept)
    assert torch.equal(grad_v.view(kept.shape).transpose(2, 4) != 0, kept)
    if 0 < p < 0.9 and length > 1:
        assert not torch.equal(kept, kept.roll(1, 0)), "groups share a mask"
        assert not torch.equal(kept, kept.roll(1, 1)), "problems share a mask"
        assert not torch.equal(kept, kept.roll(1, 3)), "heads share a mask"


def test_uncovered_rows_get_zeros() -> None:
    case = Case((4, 0, 6), 2, 8, 0.5, groups=2, lead=3, tail=5)
    for result in run(case, case.qkv(torch.float32), "cpu"):
        assert (result[:, :3] == 0).all()
        assert (result[:, 13:] == 0).all()
        assert (result[:, 3:13] != 0).any()


@pytest.mark.parametrize("grouped", [False, True])
def test_no_rows_and_no_problems(grouped: bool) -> None:
    groups = 2 if grouped else None
    for case in (Case((), 2, 4, 0.5, groups), Case((), 2, 4, 0.5, groups, tail=3)):
        for backend in ("cpu", "reference"):
            for result, x in zip(
                run(case, case.qkv(torch.float32), backend),
                [*case.qkv(torch.float32)] * 2,
                strict=False,
            ):
                assert result.shape == x.shape
                assert (result == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lengths", [(), (0,), (2, 1)])
def test_an_output_without_problems_still_has_a_gradient(
    backend: str, lengths: tuple[int, ...]
) -> None:
    q, k, v = (x.requires_grad_() for x in Case(lengths, 2, 4, tail=3).qkv(torch.float32))
    out = expert_attention(q, k, v, cumulative(lengths), backend=backend)
    assert isinstance(out, Tensor)
    assert out.requires_grad
    out.sum().backward()
    assert v.grad is not None
    assert (v.grad[sum(lengths) :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_equal_contiguous_ones(dtype: torch.dtype) -> None:
    case = Case((5, 11, 30), 3, 6, 0.5, groups=2)
    plain = case.qkv(dtype)
    expected = run(case, plain, "cpu")
    packed = torch.stack(plain, dim=2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    columns_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in plain]
    wide = [torch.cat([x, x + 1], dim=-1)[..., : case.width] for x in plain]
    every_other = [torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2] for x in plain]
    layouts = (list(packed.unbind(2)), heads_first, columns_first, wide, every_other)
    for layout in layouts:
        assert not layout[0].is_contiguous()
        for name, got, want in zip(NAMES, run(case, layout, "cpu"), expected, strict=True):
            assert torch.equal(got, want), name
    # A gradient that arrives as one broadcast value.
    q, k, v = (x.detach().requires_grad_() for x in plain)
    grads = []
    for cotangent in (torch.ones(()).to(dtype).expand_as(q), torch.ones_like(q)):
        out = expert_attention(q, k, v, case.cu_seqlens, dropout_p=0.5, seed=make_seed())
        grads.append(torch.autograd.grad(out, (q, k, v), cotangent))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_unpacked(dtype: torch.dtype) -> None:
    case = Case((5, 0, 30), 3, 6, 0.5, groups=2, lead=1, tail=2)
    plain = case.qkv(dtype)
    expected = run(case, plain, "cpu")
    qkv = torch.stack(plain, dim=2).requires_grad_()
    out, lse = OPS.expert_attention_packed(qkv, case.cu_seqlens, make_seed(), 0.5, 6**-0.5)
    (grad,) = gradients([out], [qkv])
    for name, got, want in zip(NAMES, (out, *grad.unbind(2)), expected, strict=True):
        assert torch.equal(got, want), name
    assert torch.equal(lse, OPS.expert_attention(*plain, case.cu_seqlens, None, 0.0, 6**-0.5)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_log_sum_exp(dtype: torch.dtype, grouped: bool) -> None:
    case = Case((9, 0, 140), 2, 8, groups=2 if grouped else None, lead=2, tail=1)
    qkv = case.qkv(dtype)
    found = {}
    for backend, inputs in (("cpu", qkv), ("reference", qkv), ("oracle", None)):
        inputs = as_dtype(qkv, torch.float64) if inputs is None else inputs
        pair = expert_attention(
            *(x.requires_grad_() for x in inputs),
            case.cu_seqlens,
            return_lse=True,
            backend="reference" if backend == "oracle" else backend,
        )
        assert isinstance(pair, tuple)
        assert not pair[1].requires_grad
        found[backend] = pair[1]
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    assert found["cpu"].dtype == stats
    assert found["cpu"].shape == qkv[0].shape[:-1]
    assert_within_budget(found["cpu"], found["reference"], found["oracle"], "lse")
    assert_outside_budget(found["cpu"] + 0.1, found["reference"], found["oracle"], "lse")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_and_inf_propagate(value: float, which: int, dtype: torch.dtype) -> None:
    case = Case((6, 9, 150), 1, 5, groups=1)
    qkv = [x.abs() + 0.1 for x in case.qkv(dtype)]
    qkv[which][0, 8, 0, 2] = value
    actual, low = run(case, qkv, "cpu"), run(case, qkv, "reference")
    oracle = run(case, as_dtype(qkv, torch.float64), "reference")
    out = actual[0]
    assert_within_budget(out, low[0], oracle[0], "out")
    assert out[:, :6].isfinite().all()
    assert out[:, 15:].isfinite().all()
    assert not all(result.isfinite().all() for result in actual)
    for name, got, want in zip(NAMES, actual, oracle, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite()), name


def test_a_block_of_minus_infinity_does_not_hide_later_keys() -> None:
    """Scores of -inf have probability 0, in whichever block of keys they stand."""
    case = Case((300,), 1, 4)
    q, k, v = (x.abs() + 0.1 for x in case.qkv(torch.float32))
    for first, last in ((0, 5), (0, 128), (0, 200), (128, 256), (299, 300)):
        hidden = k.clone()
        hidden[first:last, 0, 1] = -float("inf")
        results = [run(case, [q, hidden, v], name)[0] for name in ("cpu", "reference")]
        oracle = run(case, as_dtype([q, hidden, v], torch.float64), "reference")[0]
        assert oracle.isfinite().all()
        assert_within_budget(*results, oracle, f"keys {first} to {last} at -inf")


def test_extreme_scores() -> None:
    """Scores far beyond the range of exp: the maximum is taken out first."""
    case = Case((40, 150), 2, 8, scale=300.0)
    actual, _, _ = check(case, torch.float64)
    q, k, v = case.qkv(torch.float32)
    for result, want in zip(run(case, [q, k, v], "cpu"), actual, strict=True):
        assert result.isfinite().all()
        assert result.shape == want.shape


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


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(p: float, dtype: torch.dtype) -> None:
    case = Case((4, 0, 7), 2, 5, groups=2, tail=1)
    q, k, v = case.qkv(dtype)
    qkv = torch.stack([q, k, v], 2)
    tail = (case.cu_seqlens, make_seed() if p else None, p, 0.4)
    out, lse = OPS.expert_attention(q, k, v, *tail)
    grad = draw(*out.shape, dtype=dtype, seed=8)
    torch.library.opcheck(OPS.expert_attention_backward.default, (grad, q, k, v, out, lse, *tail))
    torch.library.opcheck(
        OPS.expert_attention_packed_backward.default, (grad, qkv, out, lse, *tail)
    )
    leaves = [x.requires_grad_() for x in (q, k, v, qkv)]
    torch.library.opcheck(OPS.expert_attention.default, (*leaves[:3], *tail))
    torch.library.opcheck(OPS.expert_attention_packed.default, (leaves[3], *tail))


def test_seed_governs_dropout() -> None:
    case = Case((20, 9), 2, 8, 0.5)
    q, k, v = case.qkv(torch.float32)

    def call() -> Tensor:
        out = expert_attention(q, k, v, case.cu_seqlens, dropout_p=0.5)
        assert isinstance(out, Tensor)
        return out

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    expert_attention(q, k, v, case.cu_seqlens)
    assert torch.equal(torch.get_rng_state(), state), "no dropout draws no seed"


def test_only_the_wanted_gradients() -> None:
    case = Case((5, 6), 2, 4)
    full = run(case, case.qkv(torch.float32), "cpu")
    for wanted in itertools.product([False, True], repeat=3):
        qkv = [
            x.requires_grad_(want) for x, want in zip(case.qkv(torch.float32), wanted, strict=True)
        ]
        out = expert_attention(*qkv, case.cu_seqlens)
        assert isinstance(out, Tensor)
        assert out.requires_grad == any(wanted)
        leaves = [x for x in qkv if x.requires_grad]
        if leaves:
            expected = [g for g, want in zip(full[1:], wanted, strict=True) if want]
            assert all(map(torch.equal, gradients([out], leaves), expected))


@settings(max_examples=60, deadline=None)
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
    # Of many draws one is unlucky in float32: its rounding is bounded here, not budgeted.
    size = max(float(x.abs().max()) if x.numel() else 0.0 for x in oracle)
    qkv = as_dtype(case.qkv(torch.float64), torch.float32)
    for name, got, want in zip(NAMES, run(case, qkv, "cpu"), oracle, strict=True):
        assert got.shape == want.shape, name
        assert ((got - want).abs() <= 1e-4 * size).all(), name


def test_reference_is_a_softmax() -> None:
    """The oracle itself against the textbook formula, dropout off."""
    q, k, v = (draw(1, 7, 2, 3, dtype=torch.float64, seed=i) for i in range(3))
    out, lse = attention_reference(q, k, v, cumulative([4, 3]), None, 0.0, 0.5)
    for first, last, head in itertools.product((0,), (4,), (0, 1)):
        weights = torch.exp(0.5 * q[0, first:last, head] @ k[0, first:last, head].T)
        total = weights.sum(1, keepdim=True)
        expected = weights / total @ v[0, first:last, head]
        torch.testing.assert_close(out[0, first:last, head], expected)
        torch.testing.assert_close(lse[0, first:last, head], total.log().squeeze(1))
