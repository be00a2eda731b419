"""Property tests of routing's CUDA blocks, executed by their twin on the host."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flmoe_kernels.core import backend as backends
from flmoe_kernels.ops.routing import cpu, reference
from tests.support.routing_twin import Twin, equal, random_index

native = backends.native()


@settings(max_examples=120)
@given(data=st.data())
def test_limit_and_dispatch_of_the_twin(data: st.DataObject) -> None:
    """One or several blocks and windows of bins, in any order of threads."""
    tokens = data.draw(st.integers(0, 700), "tokens")
    choices = data.draw(st.integers(1, 3), "choices")
    experts = data.draw(st.sampled_from([1, 2, 3, 8, 31, 33, 255, 256, 257, 700, 1025]), "experts")
    index = random_index(tokens, choices, experts, data.draw(st.integers(0, 99), "seed"))
    if data.draw(st.booleans(), "one expert takes all"):
        index[:] = experts - 1
    masks = (None, torch.rand(tokens) < 0.7)
    mask = masks[data.draw(st.integers(0, 1), "masked")]
    capacity = data.draw(st.sampled_from([None, 0, 1, 2, 40]), "capacity")
    block = data.draw(st.sampled_from([0, 256, 512]), "rows per block")
    twin = Twin(data.draw(st.integers(0, 9), "order"), block)
    kept = cpu.limit(index, mask, experts, capacity)
    assert torch.equal(twin.limit(index, mask, experts, capacity), kept)
    assert torch.equal(kept, reference.limit(index, mask, experts, capacity))
    for rows in (index, kept):
        assert equal(twin.dispatch(rows, experts), cpu.dispatch(rows, experts))
        assert equal(twin.dispatch(rows, experts), reference.dispatch(rows, experts))


@given(rows=st.integers(0, 2**31 - 1), bins=st.integers(1, 2**31 - 2))
def test_plan_covers_the_rows(rows: int, bins: int) -> None:
    blocks, each, alone = native.routing_plan(rows, bins)
    counters = native.routing_counters(rows, bins)
    if alone:
        assert (blocks, each, counters) == (1, rows, 0)
        assert rows <= 8192
    else:
        assert each % 1024 == 0
        assert (blocks - 1) * each < rows <= blocks * each
        assert 1 <= blocks <= 1024
        assert counters == blocks * bins <= max(2**24, bins)
