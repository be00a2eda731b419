"""Tests of the compiled Triton kernels, executed by an emulator: values, bounds, races, uninitialised reads.

One small call or a few of each operator; docs/aot.md has the command that runs many more.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from flmoe_kernels.ops.encoder import op as _op  # noqa: F401  registers the operators
from flmoe_kernels.ops.encoder import reference
from flmoe_kernels.ops.reweighting import api as reweighting
from flmoe_kernels.ops.reweighting import reference as reweighting_reference
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support import attention_cases, pair_cases, routed_cases
from tests.support.attention_cases import Case
from tests.support.encoder_cases import norm_arguments
from tests.support.encoder_tests import EncoderTests, Size
from tests.support.inputs import draw, draw_masks
from tests.support.operator_cases import (
    EPS,
    OPS,
    compare,
    loss_arguments,
    on_triton,
    reference_losses,
)
from tests.support.pair_cases import MANY, PairCase
from tests.support.ptx.emulator import emulated
from tests.support.routed_cases import RoutedCase
from tests.support.score_tests import KernelScoreTests

TRITON = "triton"
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_findings() -> Iterator[None]:
    with emulated() as findings:
        yield
    assert not findings, findings


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (PairCase(35, 63, 32, 64, batch=1, masks="both"), BFLOAT16),
        (
            PairCase(35, 33, 17, 20, batch=2, kinds=MANY, top_k=3, masks="both", reduce="pool"),
            FLOAT32,
        ),
        (PairCase(33, 20, 32, 64, batch=1, reduce="experts", top_k=2), FLOAT16),
    ],
    ids=str,
)
def test_pair_moe(case: PairCase, dtype: torch.dtype) -> None:
    pair_cases.check(case, dtype, TRITON)


class Scores(KernelScoreTests):
    backend, widest, tolerance = TRITON, FLOAT32, 1e-5


def test_pair_map_and_top_pairs() -> None:
    call = PairCase(35, 10, 7, 40, masks="sample", batch=3), FLOAT16
    Scores().test_pair_map(call)
    Scores().test_top_pairs_are_the_sorted_map(call, 6)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (RoutedCase(60, 64, 128, 4, 2, load="dropped"), BFLOAT16),
        (RoutedCase(45, 33, 72, 3, 2, "silu", "hot", gated=True), FLOAT32),
        (RoutedCase(33, 32, 64, 2, 1, "relu", bias=False), FLOAT16),
    ],
    ids=str,
)
def test_routed_mlp(case: RoutedCase, dtype: torch.dtype) -> None:
    routed_cases.check(case, dtype, TRITON)


def test_routing() -> None:
    """Choices equal those of the CPU kernels; coarse logits give ties."""
    logits, mask = draw(150, 5).round(), torch.arange(150) % 4 != 2
    choices = []
    for backend in (TRITON, "cpu"):
        x = logits.clone().requires_grad_()
        index, weight = gate(x, 2, capacity=40, mask=mask, backend=backend)
        (grad,) = torch.autograd.grad(weight.square().sum(), x)
        choices.append((weight, grad, index, *dispatch(index, 5, backend=backend)))
    for got, want in zip(*choices, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case((63, 20), 2, 32, 0.5, groups=2, tail=5), BFLOAT16),
        (Case((131, 1, 0, 4), 1, 64, 0.1), FLOAT16),
        (Case((5, 1, 0, 7, 2), 2, 8, 0.5), FLOAT32),
        (Case((40,), 1, 72, 0.0), FLOAT32),
    ],
    ids=str,
)
def test_expert_attention(case: Case, dtype: torch.dtype) -> None:
    attention_cases.check(case, dtype, TRITON)


class Encoder(EncoderTests):
    backend, precise, exhaustive = TRITON, (FLOAT32,), False


@pytest.mark.parametrize(
    "name",
    ["expert_norm", "dropout_add_norm", "expert_mlp", "dropout_add_pool", "expand_views"],
)
@pytest.mark.parametrize(
    "size", [(0, 7, 1, FLOAT32), (1, 37, 63, FLOAT16), (2, 9, 256, BFLOAT16)], ids=str
)
def test_encoder(name: str, size: Size) -> None:
    getattr(Encoder(), f"test_{name}")(size)


def test_expert_linear() -> None:
    arguments = [draw(2, 130, 64, seed=1), draw(2, 128, 64, seed=2, scale=0.1), draw(2, 128)]
    compare(on_triton("expert_linear"), reference.expert_linear, arguments, BFLOAT16)


@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_through_the_norm_of_one_column_is_zero(which: int) -> None:
    """Fused multiply-adds would leave a rounding error times 1 / sqrt(eps)."""
    _, x, gain, shift, *_ = norm_arguments(7, 1, 0.0, False)
    x.requires_grad_()
    out = OPS.dropout_add_norm(x, x.detach(), gain, shift, None, 0.0, EPS, TRITON)
    norm = OPS.expert_norm(x, gain, shift, EPS, TRITON)[0]
    (grad,) = torch.autograd.grad((out[1], norm)[which], x, draw(*x.shape, seed=5))
    assert not grad.any()


def test_reweighting() -> None:
    lengths, masks = (37, 1, 20), draw_masks("partial", 3, (37, 1, 20))
    tokens, mask = draw(3, 58, 130, seed=4), torch.cat([x for x in masks or () if x is not None], 1)
    compare(
        lambda x: reweighting.reweighting_features(
            x.split(lengths, 1), masks, [True] * 3, x, mask, TRITON
        ),
        lambda x: reweighting_reference.reweighting_features(x.split(lengths, 1), masks),
        [tokens],
        FLOAT32,
    )


@pytest.mark.parametrize("shape", [(4, 3, 23), (5, 33, 2), (2, 9, 300)])
def test_mixture_of_experts(shape: tuple[int, int, int]) -> None:
    experts, batch, classes = shape
    compare(
        lambda scores, logits: reweighting.mix_experts(scores, logits, 2.0, TRITON),
        lambda scores, logits: reweighting_reference.mix_experts(scores, logits, 2.0),
        [draw(batch, experts, seed=1, scale=3.0), draw(experts, batch, classes, seed=2)],
        FLOAT32,
        outputs=2,
    )


@pytest.mark.parametrize("shape", [(2, 7, 3), (3, 2, 130)])
def test_interaction_losses(shape: tuple[int, int, int]) -> None:
    modalities, batch, width = shape
    latents = draw(modalities + 2, modalities + 1, batch, width, seed=5, scale=0.05)
    size = 0.05 * (2 * width) ** 0.5
    for arguments in loss_arguments(latents):
        losses = on_triton("interaction_losses")
        compare(losses, reference_losses, arguments, FLOAT32, magnitude=size)
