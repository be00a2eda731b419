"""Tests of expert_attention's Triton kernels; test_attention_triton runs them in a process of their own.

There they run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import NAMES, Case, run
from torch import Tensor

from flmoe_kernels import dropout as rng
from flmoe_kernels import expert_attention
from flmoe_kernels.expert_attention import triton as kernels
from flmoe_kernels.expert_attention.triton.launch import (
    TABLE,
    AttentionCall,
    Tiles,
    class_of,
    readable,
)
from flmoe_kernels.expert_attention.triton.philox import kept_elements
from flmoe_kernels.expert_attention.triton.tiles import place
from flmoe_kernels.testing import (
    as_dtype,
    assert_outside_budget,
    assert_within_budget,
    cumulative,
    draw,
    gradients,
    make_seed,
)
from flmoe_kernels.triton_runtime import interpreted

OPS = torch.ops.flmoe
TRITON = "triton"
FLOAT32, BFLOAT16, FLOAT16 = (torch.float32, torch.bfloat16, torch.float16)
# Ragged, prime and empty runs, uncovered rows, one token; every class of tiles and width of a chunk.
CASES = (
    (Case((63, 60), 2, 32, 0.5), BFLOAT16),
    (Case((131, 1, 0, 4), 1, 64, 0.1), FLOAT16),
    (Case((196,), 1, 16, 0.5), BFLOAT16),
    (Case((70, 9), 1, 48, 0.0), FLOAT32),
    (Case((67,), 1, 17, 0.5, groups=2), FLOAT16),
    (Case((40, 33), 1, 128, 0.5), BFLOAT16),
    (Case((20, 35), 1, 130, 0.3), FLOAT16),
    (Case((9, 20), 1, 130, 0.3), FLOAT32),
    (Case((12, 4, 7, 0, 12), 3, 32, 0.5, lead=1, tail=3), BFLOAT16),
    (Case((5, 1, 0, 7, 2), 2, 8, 0.5, groups=2, lead=3, tail=5), FLOAT32),
    (Case((4, 17, 1), 1, 40, 0.999), FLOAT16),
    (Case((7, 18), 1, 24, 1.0), FLOAT32),
    (Case((9, 30), 1, 16, 0.0, scale=-1.5), FLOAT32),
    (Case((9, 30), 1, 16, 0.5, scale=0.0), FLOAT16),
    (Case((1,), 1, 1), FLOAT32),
)
EMPTY = (Case((), 2, 8, tail=4), Case((), 2, 8, groups=2), Case((0, 0), 1, 3, groups=0))


def check(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Output and gradients of the kernels, the reference and the oracle, within the error budget."""
    qkv = case.qkv(dtype)
    actual = run(case, qkv, TRITON)
    low = run(case, qkv, "reference")
    oracle = run(case, as_dtype(qkv, torch.float64), "reference")
    size = max((float(x.abs().max()) for x in oracle[1:] if x.numel()), default=0.0)
    for name, *found in zip(NAMES, actual, low, oracle, strict=True):
        # The gradients of q and k are differences; with one key per problem nothing is left of them.
        difference = name in ("grad_q", "grad_k")
        assert_within_budget(
            *found,
            f"{name} of {case} in {dtype}",
            magnitude=size if difference else 0.0,
            may_vanish=difference and max(case.lengths, default=0) < 3,
        )
    return actual, low, oracle


def test_the_interpreter_runs_them() -> None:
    assert interpreted()


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_wrong_result_fails(dtype: torch.dtype) -> None:
    """The control of the comparisons above."""
    case = Case((9, 6, 20), 1, 16, 0.3)
    _, low, oracle = check(case, dtype)
    qkv = case.qkv(dtype)
    wrong = {
        "another mask": run(case, qkv, TRITON, seed=1),
        "no dropout": run(dataclasses.replace(case, p=0.0), qkv, TRITON),
        "another rate": run(dataclasses.replace(case, p=0.31), qkv, TRITON),
        "another scale": run(dataclasses.replace(case, scale=0.27), qkv, TRITON),
        "runs shifted": run(case, qkv, TRITON, cu_seqlens=torch.tensor([0, 9, 16, 35]).int()),
        "q and k swapped": run(case, [qkv[1], qkv[0], qkv[2]], TRITON),
    }
    for reason, results in wrong.items():
        for name, *found in zip(NAMES, results, low, oracle, strict=True):
            assert_outside_budget(*found, f"{name}: {reason}")


@triton.jit
def dump_kernel(seed, threshold, problem, head, row, out, COLUMNS: tl.constexpr):
    rows = row + tl.arange(0, 16)
    first = tl.program_id(0) * COLUMNS
    kept = kept_elements(seed, threshold, problem, head, rows, first, COLUMNS)
    at = tl.arange(0, 16)[:, None] * tl.num_programs(0) * COLUMNS + first
    tl.store(out + at + tl.arange(0, COLUMNS)[None, :], kept.to(tl.int32))


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
@pytest.mark.parametrize("seed", [0, -1, 2**61 + 987654321])
def test_tiles_of_the_mask_are_the_generators(columns: int, seed: int) -> None:
    for p, problem, head, row in ((0.3, 0, 0, 0), (0.5, 2**31 - 3, 7, 8176), (1.0, 3, 1, 2)):
        found = torch.full((16, 512), -1, dtype=torch.int32)
        threshold = rng.keep_threshold(p)
        dump_kernel[(512 // columns,)](
            make_seed(seed), threshold, problem, head, row, found, columns
        )
        rows = row + torch.arange(16).view(-1, 1)
        kept = rng.keep_mask(make_seed(seed), p, problem, head, rows, torch.arange(512))
        assert torch.equal(found, kept.int())


@pytest.mark.parametrize(
    ("length", "heads", "dtype"), [(11, 3, BFLOAT16), (63, 1, FLOAT16), (130, 1, FLOAT32)], ids=str
)
def test_the_mask_is_the_cpu_kernels(length: int, heads: int, dtype: torch.dtype) -> None:
    """With v the identity the output holds the probabilities, and its zeros are the mask; so does, transposed,
    the gradient of v."""
    groups = 1 if length > 100 else 2
    zeros = torch.zeros(groups, length, heads, length, dtype=dtype)
    eye = torch.eye(length, dtype=dtype).view(length, 1, length).expand(-1, heads, -1)
    found = []
    for backend in (TRITON, "cpu"):
        v = eye.repeat(groups, 1, 1, 1).requires_grad_()
        options = {"dropout_p": 0.5, "seed": make_seed(), "backend": backend}
        out = expert_attention(zeros, zeros, v, cumulative([length]), **options)
        assert isinstance(out, Tensor)
        (grad,) = torch.autograd.grad(out, v, v.detach())
        found.append([(x != 0).view(groups, length, heads, length) for x in (out, grad)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(found[0][0], found[0][1].transpose(1, 3))
    assert 0.35 < found[0][0].double().mean() < 0.65


@triton.jit
def place_kernel(cu, slots, out, problems, rows, BLOCK: tl.constexpr):
    slot = tl.load(slots + tl.program_id(0))
    problem, first, length, start, others = place(cu, problems, rows, slot, BLOCK)
    out += tl.program_id(0) * 5
    tl.store(out, problem)
    tl.store(out + 1, first)
    tl.store(out + 2, length)
    tl.store(out + 3, start)
    tl.store(out + 4, others)


def places(cu: Tensor, rows: int, step: int = 1) -> dict[int, list[int]]:
    """What every step-th slot of blocks of 16 rows gets."""
    problems = cu.numel() - 1
    slots = torch.arange(0, rows // 16 + problems + 2, step, dtype=torch.int32)
    out = torch.full((len(slots), 5), -9, dtype=torch.int32)
    place_kernel[(len(slots),)](cu, slots, out, problems, rows, 16)
    return dict(zip(slots.tolist(), out.tolist(), strict=True))


@pytest.mark.parametrize(
    ("lengths", "lead", "tail", "step"),
    [
        ((), 0, 37, 1),
        ((15, 16, 17, 0, 33, 1), 5, 40, 1),
        ((0, 0, 64), 0, 0, 1),
        ((3, 0, 14, 2) * 20, 1, 0, 1),
        ((1, 3) * 2100, 16, 0, 151),
    ],
    ids=lambda x: str(len(x)) if isinstance(x, tuple) else str(x),
)
def test_every_block_has_one_slot(
    lengths: tuple[int, ...], lead: int, tail: int, step: int
) -> None:
    """Whatever the runs are, also where the search takes two or three steps."""
    first = 0
    expected = {}
    for i, length in enumerate((lead, *lengths, tail)):
        others = length if 0 < i <= len(lengths) else 0
        for block in range(-(-length // 16)):
            slot = first // 16 + i + block
            assert slot not in expected
            expected[slot] = [i - 1, first, length, 16 * block, others]
        first += length
    found = places(cumulative(lengths, lead), first, step)
    busy = {slot: at for slot, at in found.items() if at[3] < at[2]}
    assert busy == {slot: at for slot, at in expected.items() if slot % step == 0}
    assert max(expected, default=0) < first // 16 + len(lengths) + 2


@pytest.mark.parametrize(
    "bounds", [[0, 2, 7], [-1, 2, 6], [0, 4, 2], [0, 2**31 - 1], [-(2**31), 0], [5, 1, 3, 0]]
)
def test_runs_out_of_range_touch_nothing_else(bounds: list[int]) -> None:
    """Only where values are not read beforehand, as on a GPU, do they reach the kernels."""
    rows, cu = 6, torch.tensor(bounds, dtype=torch.int32)
    inside = (slice(None), slice(40, 40 + rows))
    wide = [torch.full((1, rows + 80, 2, 4), float("nan")) for _ in range(7)]
    for i, x in enumerate(wide[:4]):
        x[inside] = draw(1, rows, 2, 4, seed=i)
    q, k, v, grad_out, *grads = (x[inside] for x in wide)
    out, lse = kernels.forward(q, k, v, cu, make_seed(), 0.5, 1.0)
    kernels.backward(
        *(grad_out, q, k, v, cu, make_seed(), out.nan_to_num(), lse.nan_to_num(), 0.5, 1.0),
        (grads[0], grads[1], grads[2]),
    )
    for x in wide[4:]:
        assert x[:, :40].isnan().all()
        assert x[:, 40 + rows :].isnan().all()
    for at in places(cu, rows).values():
        assert at[3] >= at[2] or (at[1] >= 0 and at[1] + at[2] <= rows)


def test_uncovered_rows_get_zeros() -> None:
    case = Case((4, 0, 6), 2, 8, 0.5, groups=2, lead=3, tail=25)
    for result in run(case, case.qkv(FLOAT32), TRITON):
        assert (result[:, :3] == 0).all()
        assert (result[:, 13:] == 0).all()
        assert (result[:, 3:13] != 0).any()


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_no_rows_and_no_problems(case: Case) -> None:
    for result, x in zip(run(case, case.qkv(FLOAT32), TRITON), case.qkv(FLOAT32) * 2, strict=False):
        assert result.shape == x.shape
        assert (result == 0).all()


def test_strided_inputs_equal_contiguous_ones() -> None:
    case = Case((5, 11), 2, 6, 0.5)
    plain = case.qkv(BFLOAT16)
    expected = run(case, plain, TRITON)
    layouts = (
        list(torch.stack(plain, dim=1).unbind(1)),
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain],
        [torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2] for x in plain],
    )
    for layout in layouts:
        assert not layout[0].is_contiguous()
        for name, got, want in zip(NAMES, run(case, layout, TRITON), expected, strict=True):
            assert torch.equal(got, want), name


def test_packed_equals_unpacked() -> None:
    case = Case((5, 0, 20), 1, 6, 0.5, groups=2, lead=1, tail=2)
    plain = case.qkv(FLOAT16)
    expected = run(case, plain, TRITON)
    qkv = torch.stack(plain, dim=2).requires_grad_()
    tail = (case.cu_seqlens, make_seed(), 0.5, 6**-0.5, TRITON)
    out, _ = OPS.expert_attention_packed(qkv, *tail)
    (grad,) = gradients([out], [qkv])
    for name, got, want in zip(NAMES, (out, *grad.unbind(2)), expected, strict=True):
        assert torch.equal(got, want), name
    # A gradient that arrives as one broadcast value.
    q, k, v = (x.detach().requires_grad_() for x in plain)
    grads = []
    for cotangent in (torch.ones(()).to(FLOAT16).expand_as(q), torch.ones_like(q)):
        out, _ = OPS.expert_attention(q, k, v, *tail)
        grads.append(torch.autograd.grad(out, (q, k, v), cotangent))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_log_sum_exp(dtype: torch.dtype) -> None:
    case = Case((9, 0, 70), 2, 8, groups=2, lead=2, tail=1)
    qkv = case.qkv(dtype)
    found = []
    for backend, inputs in ((TRITON, qkv), ("reference", qkv), ("reference", None)):
        inputs = as_dtype(qkv, torch.float64) if inputs is None else inputs
        pair = expert_attention(*inputs, case.cu_seqlens, return_lse=True, backend=backend)
        assert isinstance(pair, tuple)
        found.append(pair[1])
    assert found[0].dtype == FLOAT32
    assert_within_budget(*found, "lse")
    assert_outside_budget(found[0] + 0.1, *found[1:], "lse")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_inf_propagate(value: float, which: int) -> None:
    case = Case((6, 9, 70), 1, 5, groups=1)
    qkv = [x.abs() + 0.1 for x in case.qkv(FLOAT32)]
    qkv[which][0, 8, 0, 2] = value
    actual = run(case, qkv, TRITON)
    oracle = run(case, as_dtype(qkv, torch.float64), "reference")
    assert actual[0][:, :6].isfinite().all()
    assert actual[0][:, 15:].isfinite().all()
    assert not all(result.isfinite().all() for result in actual)
    for name, got, want in zip(NAMES, actual, oracle, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite()), name


def test_a_block_of_minus_infinity_does_not_hide_later_keys() -> None:
    """Scores of -inf have probability 0, in whichever block of keys they stand."""
    case = Case((75,), 1, 4)
    q, k, v = (x.abs() + 0.1 for x in case.qkv(FLOAT32))
    for first, last in ((0, 35), (32, 64), (74, 75)):
        hidden = k.clone()
        hidden[first:last, 0, 1] = -float("inf")
        results = [run(case, [q, hidden, v], name)[0] for name in (TRITON, "reference")]
        oracle = run(case, as_dtype([q, hidden, v], torch.float64), "reference")[0]
        assert oracle.isfinite().all()
        assert_within_budget(*results, oracle, f"keys {first} to {last} at -inf")


def test_extreme_scores() -> None:
    """Scores far beyond the range of exp: the maximum is taken out first, and what would be the probability of a
    key past the last one never counts."""
    case = Case((40, 70), 1, 8, scale=300.0)
    q, k, v = case.qkv(FLOAT32)
    for inputs in ([q, k, v], [q.abs(), -k.abs(), v]):
        for result in run(case, inputs, TRITON):
            assert result.isfinite().all()


@pytest.mark.parametrize("tiles", [(32, 128), (32, 16)], ids=str)
def test_other_tiles_give_the_same_numbers(
    tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((70, 33), 1, 20, 0.5, tail=1)
    expected = run(case, case.qkv(FLOAT32), TRITON)
    for row in list(TABLE):
        monkeypatch.setitem(TABLE, row, Tiles(*tiles, 4, 1, (0, 0, 0)))
    for name, got, want in zip(NAMES, run(case, case.qkv(FLOAT32), TRITON), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


def test_a_rate_too_small_for_the_generator_drops_nothing() -> None:
    case = Case((30,), 1, 8)
    found = [run(dataclasses.replace(case, p=p), case.qkv(FLOAT32), TRITON) for p in (0.0, 1e-6)]
    assert all(map(torch.equal, *found))


def test_classes_and_layouts_of_a_call() -> None:
    """What decides on tiles, and that rows whose offsets could pass 32 bits never reach a kernel."""
    for rows, width, dtype, expected in (
        (64, 64, BFLOAT16, "short"),
        (65, 64, BFLOAT16, "long"),
        (64, 65, FLOAT16, "wide"),
        (64, 65, FLOAT32, "float32"),
        (64, 64, FLOAT32, "float32, short"),
    ):
        x = torch.empty(1, rows, 1, width, dtype=dtype, device="meta")
        assert class_of(AttentionCall(x, x, x, torch.empty(5), None, 0.0, 1.0)) == expected
    near = torch.empty(1, 2, 1, 4, device="meta")
    far = torch.empty_strided((1, 2, 1, 4), (1, 2**24 + 1, 1, 1), device="meta")
    apart = torch.empty_strided((1, 2, 1, 4), (1, 1, 1, 2), device="meta")
    for x, kept in ((near, True), (far, False), (apart, False)):
        call = AttentionCall(x, near, near, torch.empty(2, dtype=torch.int32), None, 0.0, 1.0)
        assert (readable(call).q is x) == kept
        assert readable(call).q.stride(3) == 1


def test_the_operators_refuse_what_would_read_past_a_tensor() -> None:
    q, cu = draw(1, 6, 2, 4), cumulative([6])
    seed, half = torch.zeros(2, dtype=torch.int64), q.to(FLOAT16)
    for arguments, message in (
        ((q[0], q[0], q[0], cu, None), "q: expected"),
        ((q, q[:, :5], q, cu, None), "k: expected"),
        ((q, q, half, cu, None), "v: expected"),
        ((q, q, q, cu.long(), None), "cu_seqlens: expected"),
        ((q, q, q, cu[:0], None), "cu_seqlens: expected"),
        ((q, q, q, cu, seed), "seed: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.expert_attention(*arguments, 0.5, 1.0, TRITON)


def test_opcheck() -> None:
    case = Case((4, 0, 7), 1, 5, tail=1, groups=1)
    q, k, v = case.qkv(FLOAT32)
    tail = (case.cu_seqlens, make_seed(), 0.5, 0.4, TRITON)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.stack([q, k, v], 2))]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (OPS.expert_attention.default, leaves[:3]),
        (OPS.expert_attention_packed.default, leaves[3:]),
    ):
        torch.library.opcheck(op, (*arguments, *tail), test_utils=checks)
