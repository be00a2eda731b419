"""Tests of determinism: threads, seeds and instruction sets.

Results have the same bits for any number of threads; other instruction sets give the same masks and close
results. As a script, this file saves its results: the tests run it once per instruction set.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels import InteractionMoE, expert_attention, pair_map, pair_moe, top_pairs
from flmoe_kernels.core.backend import instruction_set, instruction_sets
from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.encoder import reference
from flmoe_kernels.ops.pair_moe.kinds import KINDS
from flmoe_kernels.ops.routing.api import gate
from tests.support.encoder_cases import identity_mlp
from tests.support.inputs import (
    as_dtype,
    cumulative,
    draw,
    draw_masks,
    gradients,
    make_seed,
)
from tests.support.layers import LayerCase, outputs_and_gradients
from tests.support.operator_cases import tensors
from tests.support.pair_cases import PairCase
from tests.support.routed_cases import RoutedCase
from tests.support.routed_cases import run as run_routed

ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.flmoe
THREADS = (1, 2, 3)
# Sizes for comparisons with the reference, which is slow.
LONGEST, ROWS = 200, 70
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STEP = LayerCase((150, 70), dim=48, heads=4, layers=2, batch=3, dropout=0.5, masks="partial")
STEP_I2 = LayerCase((40, 40), "i2moe", dim=48, heads=4, layers=2, batch=3, dropout=0.5)
ROUTED = {"sparse": True, "gate": "GShardGate", "capacity": 0.6}
STEPS = [x for step in (STEP, STEP_I2) for x in (step, dataclasses.replace(step, **ROUTED))]


def attention(
    dtype: torch.dtype, backend: str, wide: torch.dtype | None = None, longest: int = 1030
) -> list[Tensor]:
    """By default more rows than one work item takes. One run is empty; some rows are in no run.

    Inputs are rounded to `dtype`; computation is in `wide`.
    """
    shape = (2, longest + 170, 3, 20)
    qkv = [draw(*shape, dtype=dtype, seed=i).to(wide or dtype).requires_grad_() for i in range(3)]
    runs = cumulative([3, longest, 0, 130], first=5)
    out = expert_attention(*qkv, runs, dropout_p=0.3, seed=make_seed(), backend=backend)
    return [out.detach(), *gradients([out], qkv)]


def encoder(dtype: torch.dtype, ops: Any, wide: torch.dtype | None = None) -> list[Tensor]:
    """All other operators of `ops`, chained, with more rows than a block or a chunk."""
    shapes = [(2, 2 * 300, 33), (2, 100, 33), (2, 100), (2, 100), (2, 100)]
    shapes += [(2, 130, 100), (2, 130), (2, 100, 130), (2, 100)]
    x, weight, bias, gain, shift, *mlp_weights = leaves = [
        draw(*shape, dtype=dtype, seed=i, scale=0.2 if i == 1 else 1.0)
        .to(wide or dtype)
        .requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    modality = (torch.arange(300) % 2).to(torch.int32)
    linear = ops.expert_linear(x, weight, bias)
    views = ops.expand_views(linear.view(2, 2, 300, 100), modality, 3).flatten(1, 2)
    mlp = tensors(ops.expert_mlp(views, *mlp_weights, make_seed(), 0.4))[0]
    norms = ops.dropout_add_norm(views, mlp, gain, shift, make_seed(3), 0.4, 1e-5)
    alone = ops.dropout_add_norm(None, norms[1], gain, shift, make_seed(4), 0.4, 1e-5)
    runs = cumulative([90, 0, 200])
    pooled = ops.dropout_add_pool(norms[0], alone[1], runs, 3, make_seed(5), 0.4)
    return [pooled.detach(), *gradients([pooled], leaves)]


def losses(dtype: torch.dtype) -> list[Tensor]:
    latents = draw(5, 4, 70, 33, dtype=dtype).requires_grad_()
    out = OPS.interaction_losses(latents, None)
    return [out.detach(), *gradients([out], [latents])]


def pairs(
    dtype: torch.dtype, backend: str, wide: torch.dtype | None = None, rows: int = 530
) -> list[Tensor]:
    """All reductions; by default more rows and columns than a block, a chunk and a work item."""
    kinds = ("unique_a", "unique_b", "synergy", "redundancy", "null")
    shapes = [(rows, 9), (300, 9), (rows, 20), (300, 20)]
    leaves = [
        draw(1, 5, *shape, dtype=dtype, seed=i).to(wide or dtype).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    bias = draw(5, dtype=dtype, seed=4).to(wide or dtype).requires_grad_()
    mask_b = (torch.arange(300) % 7 != 3).unsqueeze(0)
    found = []
    for reduce in ("none", "experts", "pool"):
        y, mass = pair_moe(
            *leaves, kinds=kinds, gate_bias=bias, mask_b=mask_b, reduce=reduce, backend=backend
        )
        found += [y.detach(), mass.detach(), *gradients([y, mass], [*leaves, bias])]
    return found


def scores() -> list[Tensor]:
    """The dense map and the top pairs of a large call."""
    case = PairCase(500, 190, 8, 12, kinds=KINDS, masks="both")
    inputs, head = case.inputs(torch.float32), draw(len(KINDS), 12, seed=9)
    options: dict[str, Any] = {**case.options(), "gate_bias": inputs[4], "backend": "cpu"}
    phi = pair_map(*inputs[:4], head, **options)
    return [phi, *top_pairs(*inputs[:4], head, n_pairs=77, **options)]


def routed(
    gated: bool,
    dtype: torch.dtype = torch.float32,
    backend: str = "cpu",
    wide: torch.dtype | None = None,
) -> list[Tensor]:
    case = RoutedCase(900, 40, 70, 5, 3, load="dropped", gated=gated)
    inputs = [x.to(wide or dtype) for x in case.inputs(dtype)]
    return run_routed(case, inputs, case.index(), backend)


def routing(dtype: torch.dtype, backend: str, wide: torch.dtype | None = None) -> list[Tensor]:
    """Weights and chosen experts; in half precision some logits are equal."""
    logits = draw(900, 37, dtype=dtype).to(wide or dtype)
    found = [gate(logits, 3, over=over, backend=backend) for over in ("selected", "all")]
    return [torch.stack([x.weight for x in found]), torch.stack([x.index for x in found])]


@torch.no_grad()
def inference(dtype: torch.dtype, backend: str, wide: torch.dtype | None = None) -> list[Tensor]:
    """Logits of the experts of both architectures, from the kernel for all of an encoder."""
    logits = []
    for case in (STEP, STEP_I2):
        layer = InteractionMoE.adopt(case.reference(dtype).to(wide or dtype), backend=backend)
        inputs = as_dtype(case.inputs(dtype), wide or dtype)
        masks = draw_masks(case.masks, case.batch, case.lengths)
        logits += layer.eval().inference(inputs, masks)[0]
    return [torch.stack(logits)]


def step(case: LayerCase, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Results, gradients and new parameters of a training step with noise and dropout from torch's generator."""
    torch.manual_seed(11)
    layer = InteractionMoE.adopt(case.reference(dtype), backend="cpu")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    masks = draw_masks(case.masks, case.batch, case.lengths)
    outputs, grads = outputs_and_gradients(layer, case.inputs(dtype), masks, None)
    for name, parameter in layer.named_parameters():
        parameter.grad = grads[name]
    optimizer.step()
    return [*outputs.values(), *grads.values(), *(p.detach() for p in layer.parameters())]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def assert_same_bits_for_any_threads(compute: Callable[[], list[Tensor]]) -> None:
    torch.set_num_threads(THREADS[0])
    first = compute()
    assert all(x.isfinite().all() for x in first)
    for threads in (*THREADS, THREADS[-1]):
        torch.set_num_threads(threads)
        assert same_bits(compute(), first), f"{threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    assert_same_bits_for_any_threads(lambda: attention(dtype, "cpu"))
    assert_same_bits_for_any_threads(lambda: encoder(dtype, OPS))
    assert_same_bits_for_any_threads(lambda: losses(dtype))
    assert_same_bits_for_any_threads(lambda: pairs(dtype, "cpu"))


@pytest.mark.parametrize(
    "compute",
    [scores, partial(routed, False), partial(routed, True)],
    ids=["scores", "mlp", "gated"],
)
def test_large_calls_do_not_depend_on_threads(compute: Callable[[], list[Tensor]]) -> None:
    assert_same_bits_for_any_threads(compute)


@pytest.mark.parametrize(("case", "dtype"), [*zip(STEPS, itertools.cycle(DTYPES[::2]))], ids=str)
def test_a_training_step_does_not_depend_on_threads(case: LayerCase, dtype: torch.dtype) -> None:
    assert_same_bits_for_any_threads(lambda: step(case, dtype))


def every_pattern(dtype: torch.dtype) -> Tensor:
    """All values of a 16-bit type, paired with random values, as (1, 2, 65536)."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(1))
    return torch.stack([patterns, patterns[order]]).view(dtype).unsqueeze(0)


def conversions(dtype: torch.dtype) -> list[Tensor]:
    """All 16-bit values converted to float32 and back, and the rounded means of pairs."""
    x = every_pattern(dtype)
    each, pairs = cumulative([1, 1]), cumulative([2])
    zero = torch.zeros_like(x)
    return [OPS.dropout_add_pool(x, zero, runs, 1, None, 0.0) for runs in (each, pairs)]


def battery() -> dict[str, Any]:
    """Masks and results for the instruction set of this process."""
    found: dict[str, Any] = {"isa": instruction_set(), "masks": [], "losses": {}}
    for width in (1, 40, 129, 300):
        ones = torch.ones(2, 70, width)
        out = OPS.expert_mlp(*identity_mlp(ones), make_seed(), 0.37)[0]
        twice = OPS.dropout_add_norm(
            None, ones, ones[:, 0].clone(), ones[:, 0].clone(), make_seed(-9), 0.37, 1e-5
        )
        eye = torch.eye(width).unsqueeze(1)
        zeros, runs = torch.zeros_like(eye), cumulative([width])
        out_p = expert_attention(zeros, zeros, eye, runs, dropout_p=0.8, seed=make_seed(77))
        found["masks"] += [out != 0, twice[0], out_p != 0]
    for dtype in DTYPES:
        found[f"attention {dtype}"] = attention(dtype, "cpu", longest=LONGEST)
        found[f"encoder {dtype}"] = encoder(dtype, OPS)
        found[f"pairs {dtype}"] = pairs(dtype, "cpu", rows=ROWS)
        found[f"routed {dtype}"] = routed(True, dtype)
        found[f"routing {dtype}"] = routing(dtype, "cpu")
        found[f"inference {dtype}"] = inference(dtype, "cpu")
        found["losses"][dtype] = losses(dtype)
    found["conversions"] = {dtype: conversions(dtype) for dtype in DTYPES[2:]}
    return found


@pytest.fixture(scope="module")
def batteries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of every instruction set of this machine."""
    folder = tmp_path_factory.mktemp("isa")
    started = []
    for isa in instruction_sets():
        path = folder / f"{isa}.pt"
        # glibc fills new memory with this byte, so that reads of uninitialised memory become visible.
        env = os.environ | {"FLMOE_ISA": isa, "MALLOC_PERTURB_": "128", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, str(path)]
        started.append((isa, path, subprocess.Popen(command, env=env, cwd=ROOT)))
    found = {}
    for isa, path, process in started:
        assert process.wait() == 0, isa
        found[isa] = torch.load(path, weights_only=True)
        assert found[isa]["isa"] == isa
    assert "baseline" in found
    return found


def test_masks_do_not_depend_on_the_instruction_set(batteries: dict[str, dict[str, Any]]) -> None:
    expected = battery()["masks"]
    for isa, found in batteries.items():
        assert same_bits(found["masks"], expected), isa
    other = [mask.roll(1, 0) for mask in expected]
    assert not same_bits(other, expected)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_half_precision_converts_exactly(
    batteries: dict[str, dict[str, Any]], dtype: torch.dtype
) -> None:
    """Subnormals, infinities, NaN and rounding to even agree with torch."""
    x = every_pattern(dtype).float()
    expected = [x.to(dtype).unsqueeze(1), ((x[:, :1] + x[:, 1:]) * 0.5).to(dtype).unsqueeze(1)]
    truncated = (expected[1].view(torch.int16) + 1).view(dtype)
    for isa, found in batteries.items():
        for got, want in zip(found["conversions"][dtype], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=isa)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found["conversions"][dtype][1], truncated, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_is_within_the_budget(
    batteries: dict[str, dict[str, Any]], dtype: torch.dtype
) -> None:
    wide = torch.float64
    operators = {
        f"attention {dtype}": [attention(dtype, "reference", x, LONGEST) for x in (None, wide)],
        f"encoder {dtype}": [encoder(dtype, reference, x) for x in (None, wide)],
        f"pairs {dtype}": [pairs(dtype, "reference", x, ROWS) for x in (None, wide)],
        f"routed {dtype}": [routed(True, dtype, "reference", x) for x in (None, wide)],
        f"routing {dtype}": [routing(dtype, "reference", x) for x in (None, wide)],
        f"inference {dtype}": [inference(dtype, "reference", x) for x in (None, wide)],
    }
    for isa, found in batteries.items():
        for name, (low, oracle) in operators.items():
            size = max((float(x.abs().max()) for x in oracle[1:]), default=0.0)
            for i, triple in enumerate(zip(found[name], low, oracle, strict=True)):
                if not triple[0].is_floating_point():
                    assert torch.equal(triple[0], oracle[i]), f"{isa}: {name} {i}"
                    continue
                # All gradients of a call are sums of terms of similar size.
                magnitude = size if i else 0.0
                assert_within_budget(
                    *triple, f"{isa}: {name} {i}", magnitude=magnitude, may_vanish=i > 0
                )
        for got, want in zip(found["losses"][dtype], losses(wide), strict=True):
            error = (got.double() - as_dtype(want, wide)).abs().max()
            assert error <= 8 * torch.finfo(dtype).eps * 10, isa


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.save(battery(), sys.argv[1])
