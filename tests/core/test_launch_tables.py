"""Tests of launch tables: lookup by architecture, and resource limits.

tests/bench/test_aot.py compiles the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flmoe_kernels.core.triton import tables
from flmoe_kernels.core.triton.tables import AMD, KNOWN, Table, architecture_of, known
from flmoe_kernels.core.triton.target import Target, assume

pytest.importorskip("triton", reason="the package triton is not installed")

from bench.aot.cases import meta
from bench.aot.operators import expert_attention, interaction_moe, pair_moe, routed_mlp
from flmoe_kernels.core.triton.launches import gpu_target, matrix_precision
from flmoe_kernels.ops.encoder.triton import fused_launch as fused
from flmoe_kernels.ops.expert_attention.triton import choice as attention_choice
from flmoe_kernels.ops.expert_attention.triton.table import TABLE as ATTENTION
from flmoe_kernels.ops.pair_moe.triton import choice as pair_choice
from flmoe_kernels.ops.pair_moe.triton import launch as pair
from flmoe_kernels.ops.pair_moe.triton.table import FEW
from flmoe_kernels.ops.pair_moe.triton.table import TABLE as PAIR
from flmoe_kernels.ops.routed_mlp.triton import choice as routed_choice
from flmoe_kernels.ops.routed_mlp.triton import launch as routed
from flmoe_kernels.ops.routed_mlp.triton.table import TABLE as ROUTED

TABLES = {"pair_moe": PAIR, "expert_attention": ATTENTION, "routed_mlp": ROUTED}
TABLES |= {"encoder": fused.TABLE}
KIB = 1024
# Shared memory of a block and of an SM in KiB, and the index in `shared`; sm_86 uses the index of sm_80.
SHARED = {80: (163, 164, 0), 86: (99, 100, 0), 90: (227, 228, 1), 100: (227, 228, 2)}


def replacements() -> Iterator[tuple[str, int, Any, Any]]:
    for name, table in TABLES.items():
        for architecture, key, tiles in table.replacements():
            yield name, architecture, key, tiles


def test_architectures_use_the_nearest_older_entry() -> None:
    nearest = {70: None, 75: None, 80: 80, 86: 86, 87: 86, 89: 86, 90: 90, 100: 100, 103: 100}
    # sm_12x is not a larger sm_100: it has the shared memory and matrix instructions of sm_89.
    nearest |= {110: 100, 120: 86, 121: 86, None: None, "gfx90a": AMD, "gfx942": AMD}
    assert {number: known(number) for number in nearest} == nearest


def test_narrower_keys_have_priority() -> None:
    table = Table({"a": 1, "b": 2}, {90: {"a": 3, "a few": 4}, 80: {"b": 5}})
    assert [table.tiles("a", number) for number in (None, 80, 90, 100)] == [1, 1, 3, 1]
    assert [table.tiles("a", number, "a few") for number in (None, 80, 90, 100)] == [1, 1, 4, 1]
    assert table.tiles("b", 90, "b few", "a few") == 4
    assert table.tiles("b", 80, "b few") == 5
    assert sorted(table.replacements()) == [(80, "b", 5), (90, "a", 3), (90, "a few", 4)]
    with pytest.raises(KeyError):
        table.tiles("c", 90)
    with pytest.raises(
        ValueError, match=r"architecture: expected some of \(80, 86, 90, 100, 'gfx'\)"
    ):
        Table({"a": 1}, {89: {"a": 2}})


def test_without_a_gpu_there_is_no_architecture() -> None:
    assert architecture_of(torch.device("cpu")) is None
    assert architecture_of(torch.device("meta")) is None


def test_amd_is_known_by_the_name_of_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compute capability, 9.4 here, looks like one of NVIDIA's."""
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    tables._architecture.cache_clear()
    try:
        assert architecture_of(torch.device("cuda", 0)) == "gfx942"
    finally:
        tables._architecture.cache_clear()
    targets = [gpu_target(name) for name in (90, "gfx90a", "gfx1100")]
    assert [(x.backend, x.warp_size) for x in targets] == [("cuda", 32), ("hip", 64), ("hip", 32)]


@pytest.mark.parametrize(
    ("architecture", "exact", "fast"),
    [(75, "ieee", "ieee"), (80, "tf32x3", "tf32"), ("gfx942", "ieee", "ieee")],
)
def test_tf32_is_used_where_it_exists(
    architecture: int | str, exact: str, fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, the precision is that of NVIDIA's newer GPUs."""
    for setting, expected in (("ieee", exact), ("tf32", fast)):
        settings = SimpleNamespace(fp32_precision=setting)
        monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
        with assume(Target(architecture, 100)):
            assert matrix_precision(torch.float32, torch.device("meta")) == expected
            assert matrix_precision(torch.bfloat16, torch.device("meta")) == exact
        assert matrix_precision(torch.float32, torch.device("cpu")).startswith("tf32")


def test_replaced_configurations_fit_where_they_are_used() -> None:
    found = list(replacements())
    assert {name for name, *_ in found} == set(TABLES)
    for name, architecture, key, tiles in found:
        if architecture == AMD:  # the compile report checks what the tables do not state
            continue
        most, of_an_sm, place = SHARED[architecture]
        shared = tiles.shared[place]
        assert 0 < shared <= most * KIB, (name, architecture, key)
        alone = getattr(tiles, "programs", 2) == 1 or FEW in key or name == "encoder"
        assert alone or 2 * (shared + KIB) <= of_an_sm * KIB, (name, architecture, key)


def test_every_replacement_is_used_by_some_call() -> None:
    """Every entry is reached by some call of the compile report; none is hidden by another entry."""
    of_pairs, of_attention, of_layers = (
        [use.call() for use, *_ in module.USES]
        for module in (pair_moe, expert_attention, routed_mlp)
    )
    used: set[tuple[str, int, Any]] = set()
    for number in KNOWN:
        for kernel in ("accumulate", "gradient", "map"):
            for reduce in ("none", "experts", "pool"):
                tiles = [pair_choice.tiles_of(kernel, call, number, reduce) for call in of_pairs]
                used |= {("pair_moe", number, entry) for entry in tiles}
        for call in of_attention:
            tiles = [
                attention_choice.tiles_of(kernel, call, number)
                for kernel in expert_attention.kernels_of(call)
            ]
            used |= {("expert_attention", number, entry) for entry in tiles}
        for kernel in ("hidden", "rows", "hidden_gradient", "weight_gradient"):
            tiles = [routed_choice.tiles_of(kernel, call, number) for call in of_layers]
            used |= {("routed_mlp", number, entry) for entry in tiles}
        for kernel, wide in fused.TABLE:
            used.add(("encoder", number, fused.tiles_of(kernel, 256 if wide else 128, number)))
    for name, architecture, key, tiles in replacements():
        assert (name, architecture, tiles) in used, (name, architecture, key)


def test_the_tables_of_the_layer_name_every_kernel() -> None:
    assert set(interaction_moe.TABLE) == set(interaction_moe.KERNELS)


def test_buffers_for_other_tiles_are_refused() -> None:
    """The kernel would write past the end of such a buffer."""
    call = pair_moe.BASE.call()
    mass = meta((8, 4, 320), torch.float32)
    tiles = pair_choice.tiles_of("accumulate", call)
    partial = meta((8, 4, 7, 64), torch.float32)
    with pytest.raises(ValueError, match="y: expected partial sums of 5 blocks, got 7"):
        pair.forward_launch(tiles, call, "pool", partial, mass)
    tiles, sides = (
        pair_choice.tiles_of("gradient", call),
        pair.make_sides(call, "none", torch.float32),
    )
    bias = meta((8, 3, 4), torch.float32)
    with pytest.raises(ValueError, match="grad_bias: expected partial sums of 5 blocks, got 3"):
        pair.gradient_launch(tiles, call, sides, pair.operand(call.q), bias)
    mlp = routed_mlp.of(routed_mlp.ODD[3].name).call()
    rows, dots = meta((mlp.rows, mlp.hidden), mlp.x.dtype), meta((mlp.rows, 2), torch.float32)
    with pytest.raises(ValueError, match="dots: expected 4 blocks of columns, got 2"):
        routed.hidden_gradient_launch(
            ROUTED["hidden_gradient", False], mlp, mlp.x, rows, rows, rows, dots
        )
