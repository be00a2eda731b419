"""Tests of the emulator: it finds each kind of damage to the PTX of kernels that are correct."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton is not installed")

from tests.support.attention_cases import Case, run
from tests.support.ptx.emulator import emulated

pytestmark = pytest.mark.slow

CASE = Case((63, 20), 1, 32, 0.5, tail=5)
# Damage, pattern, replacement, finding; None: wrong values.
DAMAGES = (
    ("no barrier", r"bar\.sync\s+0;", "", "race: read after write"),
    ("no barrier", r"bar\.sync\s+0;", "", "race: write after read"),
    ("no wait", r"cp\.async\.wait_group\s+\d+;", "", "reads a copy in flight"),
    ("no wait", r"cp\.async\.wait_group\s+\d+;", "", "writes into a copy in flight"),
    ("a wait too few", r"(cp\.async\.wait_group\s+)2;", r"\g<1>3;", "uninitialised"),
    ("no store", r"st\.shared\.v4\.b32\s+[^;]*;", "", "uninitialised"),
    ("no mask of a store", r"@%p\d+ (st\.global[^;]*;)", r"\1", "out of bounds"),
    ("no mask of a store", r"@%p\d+ (st\.global[^;]*;)", r"\1", "writes what another CTA writes"),
    ("no mask of a load", r"@%p\d+ (ld\.global[^;]*;)", r"\1", "out of bounds"),
    ("another address", r"(ld\.global[^;]*\[ %rd\d+) \+ 0", r"\1 + 2", "misaligned"),
    (
        *("another shared address", r"(st\.shared\.v4\.b32 \[ %r\d+) \+ 0", r"\1 + 163840"),
        "out of bounds shared",
    ),
    (
        *("one address", r"(st\.shared\.v4\.b32 \[) %r\d+", r"\1 global_smem"),
        "threads store different values",
    ),
    ("other operands", r"(mma\.sync\S+\s+\{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", None),
    ("another lane", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )\d+,", r"\1 7,", None),
)


@pytest.fixture(scope="module")
def undamaged() -> list[Tensor]:
    with emulated() as findings:
        results = run(CASE, CASE.qkv(torch.bfloat16), "triton")
    assert not findings, findings
    assert all(x.isfinite().all() for x in results)
    return results


@pytest.mark.parametrize(("name", "pattern", "replacement", "finding"), DAMAGES)
def test_damage_is_found(
    name: str, pattern: str, replacement: str, finding: str | None, undamaged: list[Tensor]
) -> None:
    """In each kernel one instruction of the kind is damaged; not every one is needed, so several are tried."""

    def caught(quarter: int) -> bool:
        def damage(ptx: str) -> str:
            places = list(re.finditer(pattern, ptx))
            if not places:
                return ptx
            place = places[len(places) * quarter // 4]
            return ptx[: place.start()] + place.expand(replacement) + ptx[place.end() :]

        with emulated(damage=damage) as findings:
            results = run(CASE, CASE.qkv(torch.bfloat16), "triton")
        if finding is None:
            return not all(map(torch.equal, results, undamaged))
        return finding in findings

    assert any(map(caught, (1, 2, 3, 0))), name
