"""Tests of pair_map and top_pairs: contributions of single pairs, dense and streamed."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flmoe_kernels import pair_map, top_pairs
from flmoe_kernels.ops.pair_moe.kinds import KINDS
from tests.support.pair_cases import DTYPES, MANY, PairCase
from tests.support.score_tests import (
    Call,
    KernelScoreTests,
    ScoreTests,
    arguments,
    assert_sorted,
    valid_pairs,
)

CASES = (
    PairCase(5, 7, kinds=KINDS),
    PairCase(63, 60, 32, 64, masks="both", top_k=2),
    PairCase(37, 140, 17, 65, kinds=MANY, masks="a", top_k=3),
    PairCase(130, 1, 4, 5, kinds=("synergy",), masks="b"),
    PairCase(1, 130, 3, 40, kinds=("redundancy", "null", "unique_b"), bias=False),
    PairCase(400, 9, 4, 5, batch=1),
    PairCase(0, 3),
    PairCase(3, 0, masks="both"),
    PairCase(4, 3, batch=0),
    PairCase(30, 31, masks="sample", batch=3),
)


class TestReference(ScoreTests):
    backend, widest, tied = "reference", torch.float64, (90, 260)

    @pytest.fixture(params=itertools.product(CASES, DTYPES), ids=str)
    def call(self, request: pytest.FixtureRequest) -> Call:
        return request.param


class TestCpu(TestReference, KernelScoreTests):
    backend = "cpu"


GROWTH = """
import re, torch
from flmoe_kernels import pair_map, top_pairs
def peak():
    # Peak of this program only: ru_maxrss would start at the size of the parent process.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
q, head = torch.randn(1, 2, 4000, 2), torch.ones(2, 2)
top_pairs(*[q[:, :, :9]] * 4, head, n_pairs=9, kinds=("synergy", "null"))
sizes = [peak()]
for call, options in ((top_pairs, {"n_pairs": 1000}), (pair_map, {})):
    call(q, q, q, q, head, kinds=("synergy", "null"), **options)
    sizes.append(peak())
print(sizes[1] - sizes[0], sizes[2] - sizes[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_map() -> None:
    """Measured in a new process, because other tests raise the peak; control: the map takes 2 x 61 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    streamed, dense = map(int, result.stdout.split())  # KiB
    assert streamed < 20 * 1024
    assert dense > 90 * 1024


def test_a_head_without_classes_and_no_gradient() -> None:
    case = dataclasses.replace(CASES[0], bias=False)
    tensors, options = arguments(case, torch.float32)
    options.pop("target")
    head = tensors.pop()[:, :, 2]
    for backend in ("reference", "cpu"):
        with_target = top_pairs(
            *tensors, head[:, :, None], target=torch.zeros(2).long(), n_pairs=4, **options
        )
        leaves = [x.clone().requires_grad_() for x in tensors]
        found = top_pairs(*leaves, head, n_pairs=4, **options, backend=backend)
        torch.testing.assert_close(found.values, with_target.values)
        assert not found.values.requires_grad
    phi = pair_map(*leaves, head, **options, backend="cpu")
    with pytest.raises(NotImplementedError, match="pair_map has no derivative"):
        phi.sum().backward()
    pair_map(*leaves, head, **options, backend="reference").sum().backward()
    assert leaves[0].grad is not None


@settings(max_examples=60)
@given(
    rows=st.integers(0, 60),
    columns=st.integers(0, 140),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=8),
    masks=st.sampled_from(["none", "a", "b", "both", "sample"]),
    count=st.integers(1, 40),
    levels=st.integers(1, 4),
)
def test_any_shape_with_many_ties(
    rows: int, columns: int, kinds: list[str], masks: str, count: int, levels: int
) -> None:
    case = PairCase(rows, columns, 2, 3, tuple(kinds), masks=masks, batch=2)
    (q, k, a, c, head), options = arguments(case, torch.float32)
    # There are few different tokens, so most contributions are ties.
    q, a = (x[:, :, torch.arange(rows) % levels] for x in (q, a))
    k, c = (x[:, :, torch.arange(columns) % levels] for x in (k, c))
    phi = pair_map(q, k, a, c, head, **options, backend="cpu")
    found = top_pairs(q, k, a, c, head, n_pairs=count, **options, backend="cpu")
    valid = valid_pairs(case, options)
    assert_sorted(found, phi, valid, count)
