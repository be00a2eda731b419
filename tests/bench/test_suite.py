"""Tests of the benchmark suites: peers, floors, tables and scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import suite
from bench.peers import find, peers
from flmoe_gate.floors import load_floors
from flmoe_kernels.profile.cases import BACKWARD, BOTH, FORWARD, OPERATORS, Case, cases
from flmoe_kernels.profile.check import agree
from flmoe_kernels.profile.registry import contestants, prepare
from flmoe_kernels.profile.shapes import named_shapes
from tests.support.profile_shapes import LAYER, PAIR, ROUTED, SPARSE, TINY

ROOT = Path(__file__).resolve().parents[2]
# Compiled peers are tested once, below, because each takes seconds to compile.
CHECKED = [
    *cases(shapes=TINY, phases=(BOTH,)),
    *cases(["interaction_moe"], (LAYER, SPARSE), (FORWARD,)),
    *cases(["pair_moe", "routed_mlp"], (PAIR, ROUTED), (BOTH,), ("bfloat16",)),
    *cases(["pair_moe"], (PAIR,), (BACKWARD,)),
]


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_every_contestant_computes_the_case(case: Case) -> None:
    for who in (*contestants(case), *peers(case)):
        if not who.why_not and "compiled" not in who.name:
            agree(case, who)
            prepare(case, who).call()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("pair_moe", PAIR, BOTH, variant="pool"), "compiled"),
        (Case("interaction_moe", LAYER, BOTH), "compiled+sdpa"),
        (Case("interaction_moe", LAYER, BOTH, torch.bfloat16), "reference, TF32"),
    ],
    ids=str,
)
def test_peers_with_own_precision_or_compiler(case: Case, name: str) -> None:
    """Each case takes ten seconds to minutes to compile."""
    precision = torch.get_float32_matmul_precision()
    agree(case, find(case, name))
    prepare(case, find(case, name)).call()
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(("device", "full"), [("cpu", False), ("cpu", True), ("cuda", True)])
def test_every_row_of_a_suite_names_cases_and_peers(device: str, full: bool) -> None:
    """Otherwise a misspelt name would silently time nothing."""
    rows = suite.FULL if full else suite.QUICK
    assert set(rows) == set(OPERATORS)
    for operator, listed in rows.items():
        for row in listed:
            assert set(row.shapes) <= set(named_shapes("cuda"))
            assert set(row.variants) <= set(OPERATORS[operator].variants)
        for comparison in suite.comparisons(operator, device, full):
            known = {peer.name for peer in peers(comparison.case)}
            assert comparison.peer in known, comparison


def test_floors_refer_to_comparisons_that_run() -> None:
    floors = load_floors(ROOT / "bench" / "floors.toml")
    quick, full = (
        {str(c) for operator in OPERATORS for c in suite.comparisons(operator, "cpu", full)}
        for full in (False, True)
    )
    for floor in floors.floors:
        assert floor.key in (quick if floor.threads == 1 else full)
        # The limit lies between a normal build and one that is 30% slower.
        assert 1 / 1.3 < 1 - floor.tolerance < 1
    held = {(f.case.split("/")[0], f.case.split("/")[2]) for f in floors.floors}
    for operator in ("pair_moe", "expert_attention", "routed_mlp", "interaction_moe"):
        assert (operator, BOTH) in held
    # `make bench` takes three minutes, a third of which is start-up, checks and preparation.
    assert sum(floor.seconds for floor in floors.floors if floor.threads == 1) <= 120
