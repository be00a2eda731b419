"""Tests of pair_moe's Triton kernels."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flmoe_kernels import top_pairs
from flmoe_kernels.ops.pair_moe import triton as kernels
from flmoe_kernels.ops.pair_moe.call import PairCall
from flmoe_kernels.ops.pair_moe.kinds import DEFAULT_KINDS
from flmoe_kernels.ops.pair_moe.triton import choice, table
from flmoe_kernels.ops.pair_moe.triton.launch import operand, readable
from flmoe_kernels.ops.pair_moe.triton.table import TABLE
from tests.support.inputs import draw
from tests.support.pair_cases import KIND_LISTS, MANY, REDUCTIONS, PairCase, check, run
from tests.support.pair_tests import PAIRED, PairTests
from tests.support.score_tests import Call, KernelScoreTests

TRITON = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASE = PairCase(9, 14, batch=1)
# Ragged and prime sizes, one token, several blocks; widths of a partial chunk, one chunk and several.
SIZES = (
    PairCase(1, 1, 1, 1),
    PairCase(7, 63, 5, 6, batch=1),
    PairCase(67, 20, 32, 64, batch=1),
    PairCase(35, 33, 80, 100, batch=1),
    PairCase(131, 1, 17, 65, batch=1),
    PairCase(1, 37, 3, 40),
)
MASKED = (
    ("a", None, 0),
    ("b", None, 2),
    ("sample", None, 0),
    ("sample", 2, 1),
    ("sample", None, 2),
)


def cases() -> Iterator[Any]:
    """(case, dtype): every value with every dtype or reduction, but not all combinations."""
    for i, size in enumerate(SIZES):
        for j, (dtype, reduce) in enumerate(PAIRED):
            marks = [pytest.mark.slow] if (i + j) % 3 else []
            case = dataclasses.replace(size, reduce=reduce, masks="both")
            yield pytest.param(case, dtype, marks=marks)
    for dtype, reduce in itertools.product(DTYPES, REDUCTIONS):
        yield dataclasses.replace(BASE, reduce=reduce), dtype
    for i, kinds in enumerate(KIND_LISTS):
        yield dataclasses.replace(BASE, kinds=kinds, reduce=("none", "pool")[i % 2]), torch.float32
    for dtype, choices in zip(DTYPES, ((1, 3), (2, 1), (3, 2)), strict=True):
        yield dataclasses.replace(BASE, kinds=MANY, top_k=3), dtype
        for top_k in choices:
            yield dataclasses.replace(BASE, top_k=top_k), dtype
    for masks, top_k, reduce in MASKED:
        case = PairCase(33, 20, masks=masks, top_k=top_k, reduce=REDUCTIONS[reduce], batch=2)
        yield case, torch.float16
    for temperature, bias in itertools.product((0.3, 4.0), (False, True)):
        yield dataclasses.replace(BASE, temperature=temperature, bias=bias), torch.float32


@pytest.mark.parametrize(("case", "dtype"), [*cases()], ids=str)
def test_matches_the_reference(case: PairCase, dtype: torch.dtype) -> None:
    check(case, dtype, TRITON)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", [PairCase(0, 3), PairCase(3, 0), PairCase(4, 3, batch=0)], ids=str)
def test_empty_sizes_give_zeros(case: PairCase, reduce: str) -> None:
    for result in run(dataclasses.replace(case, reduce=reduce), case.inputs(DTYPES[0]), TRITON):
        assert (result == 0).all()


class TestTriton(PairTests):
    backend, widest, columns, calls = TRITON, torch.float32, 18, (("none", None),)


# Widths of one chunk and several, one expert and eight, masked samples, fewer pairs than requested.
SCORED = (
    (PairCase(13, 9, kinds=MANY, masks="sample", batch=3), torch.float32),
    (PairCase(35, 10, 7, 40, kinds=("unique_a",)), torch.bfloat16),
    (PairCase(35, 10, 7, 40, masks="sample", batch=3), torch.float16),
    (PairCase(5, 4, masks="both", batch=3), torch.float32),
    (PairCase(35, 10, 7, 40, kinds=MANY, masks="sample", batch=3), torch.bfloat16),
    (PairCase(13, 9, batch=3), torch.float16),
)


class TestTritonScores(KernelScoreTests):
    backend, widest, tolerance = TRITON, torch.float32, 1e-5

    @pytest.fixture(params=SCORED, ids=str)
    def call(self, request: pytest.FixtureRequest) -> Call:
        return request.param

    @pytest.fixture(autouse=True)
    def chunks_of_a_few_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "_KEYS", 3 * 5 * 9 * 4)

    def test_ties_select_the_earlier_pair(self) -> None:
        """Repeated tokens give exact ties; zeros of either sign are equal; NaN is the largest."""
        case = PairCase(12, 10, batch=1)
        inputs = [x.clone() for x in case.inputs(torch.float32)[:4]]
        for x in inputs:
            x[:, :, 3:6] = x[:, :, :3]
            x[:, :, 9] = x[:, :, 0]
        inputs[2][:, :, 7], inputs[3][:, :, 7] = 0.0, -0.0
        inputs[2][:, 1, 8] = float("nan")
        head = draw(4, case.width, seed=8)
        found = [
            top_pairs(*inputs, head, n_pairs=120, kinds=DEFAULT_KINDS, backend=backend)
            for backend in (TRITON, "reference")
        ]
        for name, got, want in zip(found[0]._fields, *found, strict=True):
            if "values" in name:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)
        values = found[0].values
        place = found[0].i * 10 + found[0].j
        same = values[:, :, 1:] == values[:, :, :-1]
        assert same.sum() > 100, "the inputs have no ties"
        assert (place[:, :, 1:] > place[:, :, :-1])[same].all()
        assert place.sort(dim=2).values.eq(torch.arange(120)).all()


def test_top_pairs_refuses_more_pairs_than_a_key_can_number() -> None:
    wide = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**17, 1)
    with pytest.raises(ValueError, match=r"top_pairs: expected La \* Lb up to 2\^32.*131072"):
        top_pairs(*(wide,) * 4, torch.zeros(1, 1), n_pairs=1, kinds=("synergy",), backend=TRITON)


def test_rows_with_large_strides_are_copied() -> None:
    """Offsets within a block have 32 bits, so kernels never get strides that could exceed them."""
    near = torch.empty(1, 1, 2, 4, device="meta")
    far = torch.empty_strided((1, 1, 2, 4), (1, 1, 2**24 + 1, 1), device="meta")
    apart = torch.empty_strided((1, 1, 2, 4), (1, 1, 1, 2), device="meta")
    for x, kept in ((near, True), (far, False), (apart, False)):
        example = PairCall(x, near, near, near, None, None, None, (2,), 1, 1.0)
        assert (readable(example).q is x) == kept
        assert operand(readable(example).q)[3] == 4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TABLE.replaced)
@pytest.mark.parametrize(
    ("dtype", "kinds", "few"),
    [
        (torch.bfloat16, DEFAULT_KINDS, True),
        (torch.bfloat16, DEFAULT_KINDS, False),
        (torch.bfloat16, MANY, False),
        (torch.float32, DEFAULT_KINDS, False),
        (torch.float32, MANY, False),
    ],
)
def test_tiles_of_an_architecture(
    dtype: torch.dtype,
    kinds: tuple[str, ...],
    few: bool,
    architecture: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles agree with the launch table; small calls use its tiles for few programs, if it has any."""
    monkeypatch.setattr(choice, "architecture_of", lambda _device: architecture)
    if not few:
        monkeypatch.setattr(table, "_FEW_PROGRAMS", 0)
    case = PairCase(35, 18, 17, 20, kinds=kinds, masks="both", batch=1, reduce="pool")
    check(case, dtype, TRITON)
