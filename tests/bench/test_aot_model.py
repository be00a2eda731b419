"""The arithmetic behind the command `aot`, by hand: occupancy, work of launches, bounds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from bench.aot import architectures, costs
from bench.aot.architectures import A100, ARCHITECTURES, B200, H100, KIB, Architecture
from bench.aot.cases import CASES, Built, Case, chosen, listed, meta
from bench.aot.costs import Work
from bench.aot.model import Occupancy, occupancy, roofline, waves
from bench.aot.operators import expert_attention, pair_moe, routed_mlp
from flmoe_kernels.core.triton.launches import (
    Launch,
    Report,
    assume_multiprocessors,
    multiprocessors,
)
from flmoe_kernels.ops.pair_moe.triton import launch as pair_launches

EVERY = listed(CASES)


def report(registers: int, warps: int, shared: int = 0, tensor_memory: int = 0) -> Report:
    return Report(registers, 0, shared, {}, warps, tensor_memory)


@pytest.mark.parametrize(
    ("found", "device", "expected"),
    [
        # 168 x 32 = 5376 registers a warp, three of them in a partition of 16384, twelve on an SM.
        (report(168, 4, 36 * KIB), H100, Occupancy(3, 12, "registers")),
        # 169 are rounded up to 5632 a warp, two in a partition.
        (report(169, 4), H100, Occupancy(2, 8, "registers")),
        # 255 are 8192 a warp; eight warps fill the SM.
        (report(255, 8), A100, Occupancy(1, 8, "registers")),
        (report(255, 4), A100, Occupancy(2, 8, "registers")),
        # Three warps of 5120 in each partition are twelve: two blocks of five, and two warps stay empty.
        (report(160, 5), H100, Occupancy(2, 10, "registers")),
        # 96 KiB + 1 KiB twice in 228; 64 KiB + 1 KiB twice in 164.
        (report(64, 8, 96 * KIB), H100, Occupancy(2, 16, "shared")),
        (report(64, 8, 64 * KIB), A100, Occupancy(2, 16, "shared")),
        # 113 KiB and the one that a block costs are half of 228; a byte more is not.
        (report(32, 4, 113 * KIB), H100, Occupancy(2, 8, "shared")),
        (report(32, 4, 113 * KIB + 1), H100, Occupancy(1, 4, "shared")),
        (report(32, 1), H100, Occupancy(32, 32, "blocks")),
        (report(32, 16), H100, Occupancy(4, 64, "registers")),
        (report(24, 16), H100, Occupancy(4, 64, "warps")),
        (report(64, 4, 0, 256), B200, Occupancy(2, 8, "tensor memory")),
        (report(64, 4, 228 * KIB), B200, Occupancy(0, 0, "shared")),
    ],
)
def test_occupancy_by_hand(found: Report, device: Architecture, expected: Occupancy) -> None:
    assert occupancy(found, device) == expected


def test_waves() -> None:
    assert waves(528, Occupancy(2, 8, "registers"), H100) == 2.0
    assert waves(66, Occupancy(1, 8, "registers"), H100) == 0.5
    assert waves(1, Occupancy(0, 0, "shared"), H100) == float("inf")


@pytest.mark.parametrize(
    ("work", "seconds", "limit"),
    [
        (Work(989.4e9, 0, 0, "16"), 1e-3, "tensor"),
        (Work(494.7e9, 0, 0, "tf32"), 1e-3, "tensor"),
        (Work(494.7e9, 0, 0, "tf32x3"), 3e-3, "tensor"),
        # 16 x 132 x 1.83e9 a second.
        (Work(0, 3_864_960_000, 0, "16"), 1e-3, "exponentials"),
        (Work(0, 0, 3.35e9, "16"), 1e-3, "bytes"),
        (Work(1.0, 1.0, 1.0, "16"), 3e-6, "launch"),
    ],
)
def test_roofline_by_hand(work: Work, seconds: float, limit: str) -> None:
    found = roofline(work, H100)
    assert found.seconds == pytest.approx(seconds, rel=1e-12)
    assert found.limit == limit


def test_rates_are_those_that_an_sm_has_each_clock() -> None:
    """Dense 16-bit FLOP per clock and SM: 2048, 4096 and 8192, to the digits of the data sheets."""
    for device, each in ((A100, 2048), (H100, 4096), (B200, 8192)):
        assert device.flops_16 == pytest.approx(
            each * device.multiprocessors * device.clock, rel=2e-3
        )
        assert device.flops_tf32 == device.flops_16 / 2


def work_of(name: str, device: Architecture = H100) -> Work:
    return EVERY[name].built(device).work


def test_pair_forward_by_hand() -> None:
    """64 x 512 x 512 pairs, four experts: 2 x 32 FLOP of each logit, 2 x 64 for all but unique_a."""
    found = work_of("pair_moe/y/pair_512/bfloat16/none")
    pairs = 64 * 512 * 512
    assert found.flop == pairs * (4 * 64 + 3 * 128)
    assert found.exponentials == pairs * 4
    # q, k 64 x 4 x 512 x 32, a, c, y 64 x 4 x 512 x 64, in two bytes; mass in four; four biases.
    assert found.bytes == 64 * 4 * 512 * (2 * 32 * 2 + 3 * 64 * 2 + 4) + 4 * 2


def test_pair_forward_of_kinds_that_need_every_product() -> None:
    """The specification's 2 (R + V) per pair and expert."""
    use = pair_moe.PairUse("pair_512", torch.bfloat16, "none")
    call = dataclasses.replace(use.call(), kinds=(2, 2, 2, 2))
    y, mass = meta(call.y_shape("none"), torch.bfloat16), meta(call.q.shape[:3], torch.float32)
    launch = pair_launches.forward_launch(call, "none", y, mass, architecture=90)
    found = costs.pair_accumulate(launch, torch.bfloat16)
    assert found.flop == 64 * 512 * 512 * 4 * 2 * (32 + 64)


def test_pair_gradient_and_map_by_hand() -> None:
    """Under "pool" synergy alone has a product with its cotangent; otherwise all but unique_a."""
    pairs = 8 * 320 * 196
    logit, product = 4 * 64, 128
    assert work_of("pair_moe/grad_q/pair_base/bfloat16/pool").flop == pairs * (2 * logit + product)
    assert work_of("pair_moe/grad_k/pair_base/bfloat16/none").flop == pairs * (
        2 * logit + 3 * product
    )
    assert work_of("pair_moe/phi/pair_base/bfloat16/pool").flop == pairs * (logit + product)
    # With eight experts V is written in two chunks, each of which makes the gate again.
    many = work_of("pair_moe/y/pair_base/bfloat16/none, 8 experts")
    assert many.exponentials == pairs * 8 * 2
    assert many.flop == pairs * (8 * 64 * 2 + 6 * 128)


def test_attention_by_hand() -> None:
    """12 groups of 4 experts and 3 views, 32 samples of 160 + 196 valid tokens, 4 heads of width 64."""
    scores = 12 * 4 * 32 * 356**2
    for kernel, products in (("attend", 2), ("query_gradient", 3), ("key_gradient", 4)):
        found = work_of(f"expert_attention/{kernel}/mmimdb/bfloat16")
        assert found.flop == scores * products * 2 * 64
        assert found.exponentials == scores
    # Valid rows of q, k and v; every row of out and of the log-sum-exp; the runs; the seed.
    rows, valid = 12 * 32 * 516, 12 * 32 * 356
    found = work_of("expert_attention/attend/mmimdb/bfloat16")
    moved = valid * 3 * 256 * 2 + rows * (256 * 2 + 4 * 4)
    assert found.bytes == pytest.approx(moved, abs=4 * 33 + 8)
    # A head of 256 columns is written in two chunks: the scores twice, the output once.
    wide = work_of("expert_attention/attend/mmimdb/bfloat16/heads 1")
    assert wide.flop == 12 * 32 * 356**2 * 2 * 256 * (2 + 1)


def test_routed_by_hand() -> None:
    """Six products of 2 D F for each of N K rows, as many bytes as the matrices have."""
    rows, wide, deep = 16384 * 8, 2048, 1024
    for output in routed_mlp.PRODUCTS:
        assert work_of(f"routed_mlp/{output}/routed_large/bfloat16").flop == 2 * rows * wide * deep
    found = work_of("routed_mlp/hidden/routed_large/bfloat16")
    elements = 16384 * wide + 64 * deep * (wide + 1) + 2 * rows * deep
    assert found.bytes == 2 * elements + 4 * (65 + rows)
    assert roofline(found, H100).limit == "tensor"
    assert roofline(found, H100).seconds == pytest.approx(2 * rows * wide * deep / 989.4e12)


def test_traffic_counts_what_is_there_once() -> None:
    x = meta((8, 16), torch.float32)
    launch = Launch(None, 1, {"a": (x.expand(4, 8, 16), 1), "b": x, "n": 3, "m": None}, {}, 1, 1)
    assert costs.traffic(launch) == 2 * 8 * 16 * 4
    assert costs.traffic(launch, unread=("b",)) == 8 * 16 * 4
    assert costs.traffic(launch, twice=("b",), share={"a": 0.25}) == 8 * 16 * 4 * 2.25


def test_launches_are_those_of_the_gpu_they_are_for() -> None:
    """Persistent programs: two for each SM; outside of a case there are few."""
    for device in ARCHITECTURES.values():
        built = EVERY["routed_mlp/hidden/routed_small_e4/bfloat16"].built(device)
        assert built.launch.programs == 2 * device.multiprocessors
    before = multiprocessors(torch.device("meta"))
    with assume_multiprocessors(7):
        assert multiprocessors(torch.device("meta")) == 7
    assert multiprocessors(torch.device("meta")) == before


def test_splits_of_weight_gradients_fill_each_gpu() -> None:
    """8 tiles an expert, 4 experts: twice 108, 132 and 148 SMs want 7, 9 and 10 splits; powers of two below."""
    name = "routed_mlp/grad_w_in/routed_small_e4/bfloat16"
    splits = [
        EVERY[name].built(device).launch.constants["SPLITS"] for device in ARCHITECTURES.values()
    ]
    assert splits == [4, 8, 8]


def test_equal_kernels_have_one_specialization_and_others_another() -> None:
    def key(name: str, device: Architecture = H100) -> str:
        return EVERY[name].built(device).launch.specialization(device.number)

    first = key("expert_attention/attend/mmimdb/bfloat16")
    assert key("expert_attention/attend/enrico/bfloat16") == first
    assert key("expert_attention/attend/mimic/bfloat16") != first
    assert key("expert_attention/attend/mmimdb/bfloat16", A100) != first
    assert key("expert_attention/attend/mmimdb/float16/inference") != first


def test_every_named_shape_of_a_gpu_is_there() -> None:
    found = {case.shape for case in EVERY.values() if case.dtype == "bfloat16"}
    named = {"mmimdb", "enrico", "mimic", "pair_base", "pair_512", "pair_long"}
    assert named | {"routed_small_e4", "routed_small_e16", "routed_large"} <= found


def test_two_cases_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = EVERY["routing/scan/routed_large/bfloat16"]
    monkeypatch.setattr("bench.aot.cases.cases", lambda: iter([case, case]))
    with pytest.raises(ValueError, match="two cases are named routing/scan"):
        listed(CASES)


def test_choice_of_cases() -> None:
    every = list(EVERY.values())
    assert chosen(every) == every
    some = chosen(every, ["routing"], ["routed_large"], ["float16"])
    assert [case.name for case in some] == ["routing/gate/routed_large/float16"]
    with pytest.raises(ValueError, match=r"operator: expected one of pair_moe.*got 'pair'"):
        chosen(every, ["pair"])
    with pytest.raises(ValueError, match=r"shape: .*got 'tiny'"):
        chosen(every, shapes=["tiny"])


def test_architectures_by_name() -> None:
    assert architectures.parse("sm_80,90, sm_100a") == (A100, H100, B200)
    assert architectures.parse("90,sm_90") == (H100,)
    with pytest.raises(
        ValueError, match="arch: expected some of sm_80, sm_90, sm_100, got 'sm_75'"
    ):
        architectures.parse("sm_90,sm_75")


def test_a_case_knows_its_gpu() -> None:
    def build(device: Architecture) -> Built:
        launch = Launch(None, multiprocessors(torch.device("cpu")), {}, {}, device.number, 1)
        return Built(launch, Work(0, 0, 0, "16"))

    built = Case("a", "b", "c", "d", "", build).built(A100)
    assert (built.launch.programs, built.launch.warps) == (108, 80)


def test_scores_of_uses() -> None:
    use = expert_attention.of_layer("mimic", torch.bfloat16)
    assert use.scores == 5 * 4 * 4 * 32 * 12**2
