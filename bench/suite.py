"""Comparisons for bench/test_peers.py: checked, timed alternately with a peer, recorded.

A row lists shapes, variants, phases and peers. The rows of an operator run in order, the most important first.
Peers that compile for a minute come last, so that a time limit does not cut off other results.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from bench.peers import find
from flmoe_gate.gate import Against
from flmoe_gate.machine import torch_threads
from flmoe_gate.timing import Call, Paired, clock_for
from flmoe_kernels.core.backend import BackendUnavailable
from flmoe_kernels.profile.cases import BOTH, FORWARD, Case, cases
from flmoe_kernels.profile.ceilings import Ceilings, measure_ceilings
from flmoe_kernels.profile.check import WrongAnswer, agree
from flmoe_kernels.profile.graphs import replay_facts
from flmoe_kernels.profile.memory import peak_bytes
from flmoe_kernels.profile.registry import Contestant, default_ours, prepare, words_of
from flmoe_kernels.profile.shapes import is_cuda, named_shapes
from flmoe_kernels.profile.work import cost

SECONDS = {False: 2.0, True: 8.0}  # time limit of a comparison without a floor; key: --full


class Row(NamedTuple):
    shapes: tuple[str, ...]
    variants: tuple[str, ...]
    phases: tuple[str, ...]
    peers: tuple[str, ...]
    dtypes: tuple[str, ...] | None = None  # None: the default of `cases`
    table: bool = False  # selected by `-m table`


Rows = Mapping[str, tuple[Row, ...]]
_STEP, _TWO = (BOTH,), (FORWARD, BOTH)
_REDUCTIONS = ("none", "pool")
_SMALL = ("routed_small_e4", "routed_small_e16")
_DENSE_OR_GROUPED = ("index loop", "batched bmm", "grouped_mm")
_SMALL_ZIPF = ("routed_small_e4_zipf", "routed_small_e16_zipf")
_LARGE = ("routed_large", "routed_large_zipf")
_LAYERS = ("mmimdb", "enrico", "mimic", "tokens_24")
_OTHER_LAYERS = ("decor_mimic", "mmhs150k")

# Without --full: every operator at a small shape, against peers that need no compilation.
QUICK: Rows = {
    "pair_moe": (Row(("pair_base",), _REDUCTIONS, _TWO, ("reference",)),),
    "expert_attention": (
        Row(("mmimdb_short",), ("plain",), _TWO, ("reference",)),
        Row(("mmimdb_short",), ("dropout",), _TWO, ("unpadded sdpa",)),
    ),
    "routed_mlp": (
        Row(("routed_short",), ("bias",), _TWO, ("index loop", "batched bmm")),
        Row(("routed_short",), ("swiglu",), _STEP, ("index loop", "batched bmm")),
    ),
    "routing": (Row(("routed_small_e4",), ("",), _TWO, ("reference",)),),
    "interaction_moe": (Row(("mmimdb_short", "mimic"), ("",), _TWO, ("reference",)),),
}
# The rows of the tables, the large shapes with floors, and the other named shapes; on a GPU in addition to
# bench/targets.py, whose comparisons have limits. On a CPU, shapes for GPUs are left out.
FULL: Rows = {
    "interaction_moe": (
        Row(_LAYERS, ("",), _TWO, ("reference", "reference+sdpa"), table=True),
        Row(("mmimdb", "enrico"), ("",), _TWO, ("float32",), ("bfloat16",), table=True),
        Row(("mmimdb_sparse",), ("",), _TWO, ("reference",)),
        Row(_OTHER_LAYERS, ("",), _TWO, ("reference+sdpa",)),
        # Not in training: it takes minutes to compile and is slower than reference+sdpa.
        Row(_LAYERS, ("",), (FORWARD,), ("compiled+sdpa",), table=True),
    ),
    "expert_attention": (
        Row(("mmimdb",), ("dropout",), _TWO, ("unpadded sdpa",), table=True),
        Row(("mmimdb",), ("dropout",), _TWO, ("reference",)),
    ),
    "routed_mlp": (
        Row(_SMALL, ("bias",), _TWO, _DENSE_OR_GROUPED, table=True),
        Row(_SMALL, ("bias",), _TWO, ("grouped_mm",), ("bfloat16",), table=True),
        Row(_SMALL, ("swiglu",), _TWO, _DENSE_OR_GROUPED),
        Row(_SMALL_ZIPF, ("bias",), _TWO, ("index loop",)),
        Row(_LARGE, ("no_bias", "swiglu"), _TWO, ("grouped_mm", "scattermoe")),
    ),
    "routing": (Row(("routed_large",), ("",), (FORWARD,), ("reference",)),),
    "pair_moe": (
        Row(("pair_base", "pair_512"), _REDUCTIONS, _TWO, ("reference",)),
        Row(("pair_base",), _REDUCTIONS, _TWO, ("compiled",), table=True),
    ),
}


@dataclass(frozen=True)
class Comparison:
    """A case and the name of a peer; table: see `Row`."""

    case: Case
    peer: str
    table: bool = False

    def __str__(self) -> str:
        return f"{self.case.name} vs {self.peer}"


def comparisons(operator: str, device: str, full: bool) -> list[Comparison]:
    result: list[Comparison] = []
    for row in (FULL if full else QUICK)[operator]:
        shapes = [name for name in row.shapes if name in named_shapes(device)]
        for case in cases([operator], shapes, row.phases, row.dtypes, device=device):
            if case.variant in row.variants:
                result += (Comparison(case, peer, row.table) for peer in row.peers)
    # On a GPU, rows that differ only in dtype may become equal.
    return list(dict.fromkeys(result))


def compare(
    against: Against,
    comparison: Comparison,
    full: bool,
    seconds: float | None = None,
    graphs: bool = False,
) -> None:
    """Check both contestants, time them alternately and record the comparison.

    On a GPU, or with `graphs`, both are also timed as CUDA graphs.

    A wrong result fails the test. If a contestant cannot run here, runs out of memory or does not compile, the
    test is skipped; if the comparison has a floor, it fails.
    """
    case, limit = comparison.case, SECONDS[full] if seconds is None else seconds
    peer = find(case, comparison.peer)

    def skip(reason: str) -> NoReturn:
        against.skip(case.name, peer.name, case.device, reason)

    try:
        ours = default_ours(case)
    except BackendUnavailable as error:
        skip(str(error))
    if peer.why_not:
        skip(f"{peer.name}: {peer.why_not}")
    agree(case, ours)
    try:
        agree(case, peer)
        prepare(case, peer).call()
    except WrongAnswer:
        raise
    except Exception as error:
        skip(f"{peer.name}: {words_of(error)}")

    def maker(contestant: Contestant) -> Call:
        return lambda: prepare(case, contestant).call

    recorded = against.benchmark.extra_info
    recorded.update(ours=ours.name, peer_version=peer.version, shape=asdict(case.shape))

    def facts(paired: Paired) -> dict[str, Any]:
        work, called = cost(case), paired.ours.median
        ceilings = _ceilings(case.device, case.dtype, recorded["threads"])
        bound, binds = ceilings.roofline_seconds(work, case.dtype)
        rates: dict[str, Any] = {
            "flop_per_second": work.flop / called,
            "bytes_per_second": work.bytes / called,
            "share_of_roofline": bound / called,
            "binds": binds,
        }
        if full:
            rates["peaks"] = {who.name: _peak(case, who) for who in (ours, peer)}
        if graphs or is_cuda(case.device):
            for key, who, spread in (("ours", ours, paired.ours), ("peer", peer, paired.peer)):
                make, median = maker(who), spread.median
                rates[f"{key}_as_graph"] = replay_facts(make, median, case.device, limit / 2)
        return rates

    against(
        maker(ours),
        maker(peer),
        name=case.name,
        peer_name=peer.name,
        fresh=True,
        device=case.device,
        seconds=limit,
        facts=facts,
    )


def _peak(case: Case, contestant: Contestant) -> int | None:
    try:
        return peak_bytes(case, contestant)
    except RuntimeError:
        return None


@functools.cache
def _ceilings(device: str, dtype: torch.dtype, threads: int) -> Ceilings:
    """Ceilings of the machine, timed with the same clock and number of threads as the comparison."""
    with torch_threads(threads):
        return measure_ceilings(device, (dtype,), clock=clock_for(device, threads)[1])


def options(config: pytest.Config) -> tuple[str, bool]:
    """Values of --device and --full."""
    chosen: Any = config.getoption
    return str(chosen("--device")), bool(chosen("--full"))
