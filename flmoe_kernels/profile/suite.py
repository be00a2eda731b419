"""Many cases at once: what is timed against whom, and everything that is known of each afterwards, as JSON.

The file is one that `bench compare` reads (see `results`); its runs hold, besides rows, this machine's ceilings,
for every case its cost and the bound that the roofline sets, and of every contestant rates, memory, or why it
was left out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .cases import BOTH, FORWARD, Case, cases
from .ceilings import Ceilings
from .check import agree
from .contestants import OURS, Contestant, contestants, default_ours, prepare
from .costs import cost
from .environment import environment
from .failures import words_of
from .measure import clock_of
from .memory import peak_bytes
from .paired import LEAST_BLOCKS, Blocks, Clock, clock_for, measure_blocks
from .results import SCHEMA, row_of, rows_of
from .shapes import is_cuda
from .targets import outcomes, targets_of

# By operator: shapes, variants, peers.
_Listed = Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]
# The quick set: an operator's small shapes and variants, and peers that need no compiler.
_QUICK: _Listed = {
    "pair_moe": (("pair_base",), ("none", "pool"), ("reference",)),
    "expert_attention": (("mmimdb_short",), ("dropout",), ("reference", "unpadded sdpa")),
    "routed_mlp": (("routed_small_e4",), ("bias",), ("index loop", "batched bmm")),
    "routing": (("routed_small_e4",), ("",), ("reference",)),
    "interaction_moe": (("mmimdb_short", "mimic"), ("",), ("reference",)),
}
# What the README tells of, as _QUICK: large named shapes. Compiling the layer takes many minutes for each case.
_NAMED: _Listed = {
    "interaction_moe": (("mmimdb", "enrico", "mimic"), ("",), ("reference", "reference+sdpa")),
    "expert_attention": (("mmimdb",), ("dropout",), ("reference", "unpadded sdpa")),
    "routed_mlp": (
        ("routed_small_e4", "routed_small_e16"),
        ("bias",),
        ("index loop", "batched bmm"),
    ),
    "pair_moe": (("pair_base",), ("none", "pool"), ("reference", "compiled")),
}
PRECISION = 0.02
FAILED = "failed"

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Entry:
    """A case, our contestant and those that it takes turns with; others stand in left_out with their why_not."""

    case: Case
    ours: Contestant
    peers: tuple[Contestant, ...]
    left_out: tuple[Contestant, ...] = ()

    @property
    def all(self) -> tuple[Contestant, ...]:
        return (self.ours, *self.peers)


def entry_of(case: Case, peers: Sequence[str] | None = None) -> Entry:
    """All contestants of a case, or our default and these peers.

    Raises:
        backend.BackendUnavailable: none of this package's kernels runs it here.
    """
    ours = default_ours(case)
    others = [
        x
        for x in contestants(case)
        if x.name != ours.name and (peers is None or x.name in peers or x.kind == OURS)
    ]
    runs = tuple(x for x in others if not x.why_not)
    return Entry(case, ours, runs, tuple(x for x in others if x.why_not))


def quick(device: str = "cpu") -> list[Entry]:
    """Every operator at a small shape, forward and forward+backward, against peers that start at once."""
    return _entries(_QUICK, device)


def named(device: str = "cpu") -> list[Entry]:
    """The layer and its operators at the large named shapes, forward and training step."""
    return _entries(_NAMED, device)


def _entries(listed: _Listed, device: str) -> list[Entry]:
    return [
        entry_of(case, peers)
        for operator, (shapes, variants, peers) in listed.items()
        for case in cases([operator], shapes, (FORWARD, BOTH), device=device)
        if case.variant in variants
    ]


def full(device: str = "cpu") -> list[Entry]:
    """Every case of the registry with every contestant that runs here."""
    return [entry_of(case) for case in cases(device=device)]


def run_suite(
    entries: Iterable[Entry],
    *,
    seconds: float = 8.0,
    threads: int | None = None,
    memory: bool = True,
    ceilings: Ceilings | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Check, time and measure every entry; JSON's values, in the form that `bench compare` reads.

    A contestant that fails is left out with what it said; our first one, the one that peers are held to, raises.

    Args:
        seconds: of timing for a case, at most.
        threads: of torch and the kernels; default torch's own.
        memory: also measure peaks.
        ceilings: of this machine, for shares of the roofline; None for none.
        report: called with the details of each case as it is done.

    Raises:
        WrongAnswer: our contestant is wrong.
    """
    chosen = list(entries)
    threads = threads or torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    details = []
    for entry in chosen:
        found, detail = measure_entry(entry, seconds, threads, memory, ceilings)
        rows += found
        details.append(detail)
        if report is not None:
            report(detail)
    device = chosen[0].case.device if chosen else "cpu"
    return document(device, rows, details, ceilings)


def document(
    device: str,
    rows: Sequence[Mapping[str, Any]],
    details: Sequence[Mapping[str, Any]],
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """The file's content; with what it says of each target of this kind of device."""
    run = {
        "environment": environment(device),
        "rows": list(rows),
        "gate": [],
        "ceilings": ceilings.as_dict() if ceilings else None,
        "details": list(details),
    }
    found = outcomes(targets_of(device), {"runs": [run]})
    return {"schema": SCHEMA, "runs": [run | {"targets": [one.as_dict() for one in found]}]}


def measure_entry(
    entry: Entry, seconds: float, threads: int, memory: bool, ceilings: Ceilings | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one case as `bench` writes them, and its details."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        entry = without_failing(entry)
        started = time.monotonic()
        blocks = measure_blocks(
            lambda: {x.name: prepare(entry.case, x).call for x in entry.all},
            _clock_for(entry.case.device, threads),
            rounds=LEAST_BLOCKS,
            precision=PRECISION,
            seconds=seconds,
        )
        spent = time.monotonic() - started
        peaks = {x.name: _peak(entry.case, x) if memory else None for x in entry.all}
    finally:
        torch.set_num_threads(before)
    detail = _detail(entry, blocks, peaks, ceilings)
    return _rows(entry, blocks, threads), detail | {"seconds": spent}


def _clock_for(device: str, threads: int) -> tuple[str, Clock]:
    """Its name and itself; events lie on the stream of the very device."""
    name, clock = clock_for(device, threads)
    return name, clock_of(device) if is_cuda(device) else clock


def without_failing(entry: Entry) -> Entry:
    """The entry with its failing peers left out: one that lacks memory or does not compile stops nobody else.

    Nor does another backend of this package; its why_not begins with FAILED as that of every peer that failed.

    Raises:
        Exception: whatever our own contestant fails with.
    """
    agree(entry.case, entry.ours)
    peers, lost = [], list(entry.left_out)
    for peer in entry.peers:
        try:
            agree(entry.case, peer)
            prepare(entry.case, peer).call()
        except Exception as error:
            lost.append(replace(peer, why_not=f"{FAILED}: {words_of(error)}"))
        else:
            peers.append(peer)
        _release()
    return Entry(entry.case, entry.ours, tuple(peers), tuple(lost))


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak(case: Case, contestant: Contestant) -> int | None:
    """None as well where measuring fails: a peer that runs out of memory in a process of its own stops nobody."""
    try:
        return peak_bytes(case, contestant)
    except RuntimeError:
        return None


def _rows(entry: Entry, blocks: Blocks, threads: int) -> list[dict[str, Any]]:
    name, ours = entry.case.name, entry.ours.name
    rows = [row_of(name, ours, threads, blocks)]
    rows += [
        rows_of(name, ours, peer.name, threads, blocks.pair(ours, peer.name))[1]
        for peer in entry.peers
    ]
    return [asdict(row) for row in rows]


def _detail(
    entry: Entry,
    blocks: Blocks,
    peaks: Mapping[str, int | None],
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    case, work = entry.case, cost(entry.case)
    bound, binds = None, None
    if ceilings is not None:
        bound, binds = ceilings.roofline_seconds(work, case.dtype)
    timed = []
    for one in entry.all:
        seconds = blocks.of(one.name)
        found: dict[str, Any] = asdict(one) | asdict(seconds)
        found["flop_per_second"] = work.flop / seconds.p50
        found["bytes_per_second"] = work.bytes / seconds.p50
        found["share_of_roofline"] = None if bound is None else bound / seconds.p50
        found["peak_bytes"] = peaks[one.name]
        if one is not entry.ours:
            pair = blocks.pair(entry.ours.name, one.name)
            found |= {"ratio": pair.ratio, "ratio_low": pair.low, "ratio_high": pair.high}
        timed.append(found)
    return {
        "case": case.name,
        "device": case.device,
        "shape": asdict(case.shape),
        **asdict(work),
        "roofline_seconds": bound,
        "binds": binds,
        "clock": blocks.clock,
        "contestants": timed,
        "left_out": [asdict(one) for one in entry.left_out],
    }
