"""Tests of expert_attention's Triton kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flmoe_kernels import expert_attention
from flmoe_kernels.ops.expert_attention import triton as kernels
from flmoe_kernels.ops.expert_attention.triton import choice, launch
from flmoe_kernels.ops.expert_attention.triton.launch import readable
from flmoe_kernels.ops.expert_attention.triton.table import TABLE, AttentionCall, Tiles
from tests.support.attention_cases import NAMES, Case, check, run
from tests.support.attention_tests import AttentionTests
from tests.support.inputs import cumulative, draw, gradients, make_seed

TRITON = "triton"
FLOAT32, BFLOAT16, FLOAT16 = (torch.float32, torch.bfloat16, torch.float16)
# Ragged, prime and empty runs, uncovered rows, one token; all classes of tiles and all chunk widths.
CASES = (
    (Case((63, 60), 2, 32, 0.5), BFLOAT16),
    (Case((131, 1, 0, 4), 1, 64, 0.1), FLOAT16),
    (Case((70,), 1, 16, 0.5), BFLOAT16),
    (Case((70, 9), 1, 48, 0.0), FLOAT32),
    (Case((67,), 1, 17, 0.5, groups=2), FLOAT16),
    (Case((40, 33), 1, 128, 0.5), BFLOAT16),
    (Case((20, 35), 1, 130, 0.3), FLOAT16),
    (Case((9, 20), 1, 130, 0.3), FLOAT32),
    (Case((35, 12), 1, 72, 0.5), FLOAT32),
    (Case((12, 4, 7, 0, 12), 3, 32, 0.5, lead=1, tail=3), BFLOAT16),
    (Case((5, 1, 0, 7, 2), 2, 8, 0.5, groups=2, lead=3, tail=5), FLOAT32),
    (Case((4, 17, 1), 1, 40, 0.999), FLOAT16),
    (Case((7, 18), 1, 24, 1.0), FLOAT32),
    (Case((9, 30), 1, 16, 0.0, scale=-1.5), FLOAT32),
    (Case((9, 30), 1, 16, 0.5, scale=0.0), FLOAT16),
    (Case((1,), 1, 1), FLOAT32),
)


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, TRITON)


class TestTriton(AttentionTests):
    backend, heads, length = TRITON, 1, 70

    @pytest.fixture(
        params=[FLOAT32, BFLOAT16, pytest.param(FLOAT16, marks=pytest.mark.slow)], ids=str
    )
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param


@pytest.mark.parametrize("tiles", [(32, 128), (32, 16), (32, 64), (64, 32)], ids=str)
def test_other_tiles_give_the_same_numbers(
    tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes tiles of spread keys: all of a block of 128, some, less than one run."""
    case = Case((150, 33, 5), 1, 20, 0.5, tail=1)
    expected = run(case, case.qkv(FLOAT32), TRITON)
    monkeypatch.setattr(launch, "_SPREAD_ROWS", 1)
    for row in list(TABLE):
        monkeypatch.setitem(TABLE, row, Tiles(*tiles, 4, 1, (0, 0, 0)))
    for name, got, want in zip(NAMES, run(case, case.qkv(FLOAT32), TRITON), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "p", "dtype", "architecture"),
    [
        (32, 0.5, BFLOAT16, 86),
        (32, 0.5, BFLOAT16, 90),
        (32, 0.0, FLOAT16, 80),
        (72, 0.3, BFLOAT16, 86),
        (72, 0.3, BFLOAT16, 90),
        (130, 0.3, BFLOAT16, 80),
        (130, 0.3, BFLOAT16, 100),
        (130, 0.0, FLOAT32, 100),
    ],
)
def test_tiles_of_an_architecture(
    width: int, p: float, dtype: torch.dtype, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles agree with the launch table."""
    monkeypatch.setattr(choice, "architecture_of", lambda _device: architecture)
    check(Case((67, 20), 1, width, p), dtype, TRITON)


@pytest.mark.parametrize(("p", "option", "tiny"), [(0.0, "p", 1e-6), (0.5, "scale", 1e-50)])
def test_a_rate_or_scale_too_small_to_represent_is_zero(p: float, option: str, tiny: float) -> None:
    """A scale of 0 does not turn the -inf of keys past the last into NaN."""
    case = Case((9, 30), 1, 8, p)
    found = [
        run(dataclasses.replace(case, **{option: x}), case.qkv(FLOAT32), TRITON)
        for x in (tiny, 0.0)
    ]
    assert all(map(torch.equal, *found))


def test_rows_with_offsets_beyond_32_bits_are_copied() -> None:
    def strided(groups: int, *strides: int) -> Tensor:
        return torch.empty_strided((groups, 2, 1, 4), strides, device="meta")

    for x, kept in (
        (strided(1, 1, 2**24, 4, 1), True),
        (strided(2, 24, 12, 4, 1), True),
        (strided(2, 25, 12, 4, 1), False),
        (strided(1, 1, 2**24 + 1, 1, 1), False),
        (strided(1, 1, 1, 1, 2), False),
    ):
        near = torch.empty(x.shape, device="meta")
        call = AttentionCall(x, near, near, torch.empty(2, dtype=torch.int32), None, 0.0, 1.0)
        q = readable(call).q
        assert (q is x) == kept
        assert q.stride(3) == 1
        assert q.stride(0) == 2 * q.stride(1) or len(q) == 1


@pytest.mark.parametrize("lengths", [(20, 3), ()], ids=str)
def test_rows_of_no_problem_are_not_read(lengths: tuple[int, ...]) -> None:
    """Rows after the last problem may be anything: their results are 0, those of the others do not change."""
    rows, groups, width = 41, 2, 8
    cu, valid = cumulative(list(lengths)), sum(lengths)
    x = [draw(groups, rows, 2, width, seed=i) for i in range(4)]
    results = []
    for other in (0.0, float("nan")):
        q, k, v, grad_out = (each.clone() for each in x)
        for each in (q, k, v, grad_out):
            each[:, valid:] = other
        out, lse = kernels.forward(q, k, v, cu, make_seed(), 0.5, 1.0)
        grads = [torch.empty_like(q) for _ in range(3)]
        kernels.backward(grads, grad_out, q, k, v, out, lse, cu, make_seed(), 0.5, 1.0)
        results.append([out, lse, *grads])
    assert all(map(torch.equal, *results))
    assert all((each[:, valid:] == 0).all() for each in results[0])


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("backend", [TRITON, "cpu", "reference"])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    case = Case((5, 7), 2, 8, 0.5)
    expected = run(case, case.qkv(dtype), backend)
    leaves = [x.requires_grad_() for x in case.qkv(dtype)]
    options = {"dropout_p": case.p, "seed": make_seed(), "backend": backend}
    with torch.autocast("cpu", dtype=BFLOAT16):
        out = expert_attention(*leaves, case.cu_seqlens, **options)
    for name, got, want in zip(NAMES, (out, *gradients([out], leaves)), expected, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want), name
