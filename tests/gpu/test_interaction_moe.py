"""Tests of InteractionMoE on a GPU: parity, no synchronization, CUDA graphs, autocast, torch.compile."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import InteractionMoE, PairInteractionMoE
from flmoe_kernels.core import backend as backends
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.layers.interaction_moe.forward import position_table
from tests.support.inputs import as_dtype, draw_masks, draw_replacements
from tests.support.layers import LayerCase, named_outputs, outputs_and_gradients
from tests.support.pair_layers import PairModel

DEVICE = torch.device("cuda")
RUNS, WHY_NOT = backends.backend_status()["triton"]
ON_GPU = RUNS and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not ON_GPU, reason=f"the kernels do not run on a GPU here: {WHY_NOT}"
)
FL = LayerCase((37, 23), dim=64, heads=4, batch=5, layers=2, masks="partial")
MIMIC = LayerCase((4, 4, 4), dim=128, heads=4, batch=32, layers=2, classes=2, dropout=0.5)
I2 = LayerCase((16, 16), "i2moe", dim=64, heads=2, batch=4, layers=2)
CASES = (
    FL,
    dataclasses.replace(FL, masks="mixed", lengths=(63, 60, 1)),
    dataclasses.replace(FL, lengths=(320, 196), dim=256, batch=2, masks="padded_modality"),
    I2,
    dataclasses.replace(MIMIC, dropout=0.0),
    # As many choices as experts: tokens that rounding sends to another expert cannot be compared.
    dataclasses.replace(FL, gate="NaiveGate", mlp_experts=2, sparse=True),
)
# Cases and masks of training steps that must not wait.
WAITS = (
    (FL, "partial"),
    (MIMIC, "none"),
    (dataclasses.replace(I2, dropout=0.5), "none"),
    (dataclasses.replace(FL, gate="GShardGate", sparse=True), "padded_sample"),
    (dataclasses.replace(FL, gate="SwitchGate", sparse=True), "padded_sample"),
    (dataclasses.replace(FL, gate="NoisyGate", sparse=True), "partial"),
)
# The kernels of both 16-bit types differ only in types.
DTYPES = (
    *(torch.float32, torch.bfloat16),
    pytest.param(torch.float16, marks=pytest.mark.slow),
)
Named = dict[str, Tensor]


def moved(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(DEVICE)
    return None if tree is None else [moved(each) for each in tree]


def gpu_layer(case: LayerCase, dtype: torch.dtype = torch.float32) -> InteractionMoE:
    return InteractionMoE.adopt(case.reference(dtype).to(DEVICE), backend="triton")


def results(layer: nn.Module, x: list[Tensor], masks: Any, noise: Any) -> Named:
    outputs, grads = outputs_and_gradients(layer, x, masks, noise)
    return {name: value.cpu() for name, value in {**outputs, **grads}.items()}


@contextmanager
def nothing_waits() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Training:
    """A layer, inputs at fixed addresses, and an optimizer that works in a CUDA graph."""

    def __init__(self, case: LayerCase, masks: str = "none") -> None:
        self.case, self.layer = case, gpu_layer(case)
        self.x = moved(case.inputs())
        self.masks = moved(draw_masks(masks, case.batch, case.lengths))
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=1e-3, capturable=True)

    def loss(self) -> Tensor:
        outputs = named_outputs(self.layer(self.x, self.masks))
        loss = outputs["logits"].float().square().mean() + outputs["losses"].float().sum()
        return loss + outputs["gate_losses"].sum() if "gate_losses" in outputs else loss

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=False)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_error_budget_and_the_same_bits_again(
    case: LayerCase, dtype: torch.dtype
) -> None:
    x = case.inputs(dtype)
    masks, noise = (
        draw_masks(case.masks, case.batch, case.lengths),
        draw_replacements(x, case.experts),
    )
    layer = gpu_layer(case, dtype)
    found = [results(layer, moved(x), moved(masks), moved(noise)) for _ in range(2)]
    low = results(case.reference(dtype), x, masks, noise)
    wide = as_dtype(x, torch.float64), as_dtype(noise, torch.float64)
    exact = results(case.reference(dtype).double(), wide[0], masks, wide[1])
    size = max(float(value.abs().max()) for name, value in exact.items() if "." in name)
    for name, oracle in exact.items():
        assert torch.equal(found[0][name], found[1][name]), name
        assert_within_budget(
            found[0][name],
            low[name],
            oracle,
            f"{name} of {case} in {dtype}",
            magnitude=size if "." in name else 0.0,
            may_vanish="." in name,
        )
    assert_outside_budget(
        found[0]["expert_logits"].flip(0), low["expert_logits"], exact["expert_logits"], "flipped"
    )


def test_dropout_is_the_cpu_kernels_mask_for_mask() -> None:
    """Both devices use the same seeds, drawn on the CPU; the reweighting has no dropout of torch."""
    case = dataclasses.replace(FL, masks="none", dropout=0.3)
    x = case.inputs()
    noise, found = draw_replacements(x, case.experts), []
    drawn = torch.randint
    try:
        torch.randint = lambda *a, device=None, **k: drawn(*a, **k).to(device)  # type: ignore[assignment]
        for backend, move in (("triton", moved), ("cpu", lambda tree: tree)):
            layer = InteractionMoE.adopt(case.reference(), backend=backend)
            for part in layer.reweight.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
            if backend == "triton":
                layer.to(DEVICE)
            torch.manual_seed(5)
            found.append(results(layer, move(x), None, move(noise)))
    finally:
        torch.randint = drawn  # type: ignore[assignment]
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want, rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize(("case", "masks"), WAITS, ids=str)
def test_a_training_step_does_not_synchronize(case: LayerCase, masks: str) -> None:
    training = Training(case, masks)
    training.step()
    with nothing_waits():
        loss = training.step()
        training.layer.inference(training.x, training.masks)
    assert loss.isfinite()
    with nothing_waits(), pytest.raises(RuntimeError, match="synchronizing"):
        loss.item()


@pytest.mark.parametrize("case", [dataclasses.replace(FL, dropout=0.5), MIMIC], ids=str)
def test_a_cuda_graph_captures_a_whole_training_step(case: LayerCase) -> None:
    """The graph has forward, losses, backward and optimizer. Other masks and tokens use the same graph, and every
    replay draws new noise and dropout."""
    training = Training(case, "partial")
    training.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = training.step()
    before = [p.detach().clone() for p in training.layer.parameters()]
    losses = []
    for seed in range(3):
        masks = draw_masks("partial", case.batch, case.lengths, seed)
        with torch.no_grad():
            for m, each in enumerate(case.inputs(seed=seed)):
                training.x[m].copy_(each)
                training.masks[m].copy_(masks[m])
        graph.replay()
        losses.append(float(held))
        graph.replay()
        losses.append(float(held))
    assert all(torch.tensor(losses).isfinite())
    assert len(set(losses)) == len(losses)
    assert not all(map(torch.equal, before, training.layer.parameters()))


def graphable(kind: str, dropout: float) -> nn.Module:
    if kind == "interactions":
        return gpu_layer(dataclasses.replace(FL, dropout=dropout))
    pairs = PairInteractionMoE([FL.dim] * 2, num_classes=3, modality_dropout=dropout)
    return PairModel(pairs.to(DEVICE))


@pytest.mark.parametrize("kind", ["interactions", "pairs"])
def test_make_graphed_callables(kind: str) -> None:
    """It trains without waiting, gradients are those of the module, and every replay draws new random numbers."""
    x, masks = moved(FL.inputs()), moved(draw_masks("partial", FL.batch, FL.lengths))
    logits = 2 if kind == "interactions" else 0
    plain = graphable(kind, 0.0)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(plain), (x, masks))
    grads = []
    for model in (plain, graphed):
        model(x, masks)[logits].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for wanted, found in zip(*grads, strict=True):
        # A graph computes zeros for parameters that the logits do not depend on.
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted)
    graphed = torch.cuda.make_graphed_callables(graphable(kind, 0.5), (x, masks))
    before = [p.detach().clone() for p in graphed.parameters()]
    draws = [graphed(x, masks)[logits].detach().clone() for _ in range(2)]
    assert not torch.equal(*draws)
    optimizer = torch.optim.AdamW(graphed.parameters(), lr=1e-3)
    with nothing_waits():
        for _ in range(3):
            optimizer.zero_grad()
            graphed(x, masks)[logits].square().mean().backward()
            optimizer.step()
    assert not any(map(torch.equal, before, graphed.parameters()))
    assert all(p.isfinite().all() for p in graphed.parameters())


def test_a_replay_agrees_with_the_layer() -> None:
    """Without random numbers, on data that did not exist during the capture."""
    case = dataclasses.replace(FL, dropout=0.0)
    layer, x = gpu_layer(case).eval(), moved(case.inputs())
    masks = moved(draw_masks("partial", case.batch, case.lengths))
    noise = moved(draw_replacements(case.inputs(), case.experts))
    leaves = [each.requires_grad_() for each in (*x, *layer.parameters())]

    def call() -> list[Tensor]:
        outputs = named_outputs(layer(x, masks, replacements=noise))
        total = outputs["logits"].sum() + outputs["losses"].sum()
        return [*outputs.values(), *torch.autograd.grad(total, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    other = draw_masks("padded_sample", case.batch, case.lengths, 9)
    with torch.no_grad():
        for m, each in enumerate(case.inputs(seed=77)):
            x[m].copy_(each)
            masks[m].copy_(other[m])
    graph.replay()
    assert all(map(torch.equal, held, call()))


def test_positions_are_cached_per_stream_but_not_in_a_capture() -> None:
    def table() -> Tensor:
        return position_table(
            19, 8, torch.device("cuda", torch.cuda.current_device()), torch.float32
        )

    kept = table()
    assert table() is kept
    with torch.cuda.stream(torch.cuda.Stream()):
        assert table() is not kept
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = table()
    assert captured is not kept
    assert table() is kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_gradient_scaler(dtype: torch.dtype) -> None:
    training = Training(dataclasses.replace(FL, dropout=0.1), "partial")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    before = [p.detach().clone() for p in training.layer.parameters()]
    losses = []
    for _ in range(8):
        training.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            result = training.layer(training.x, training.masks)
            loss = training.loss()
        assert result[2].dtype == result[1].dtype == result[-1][0].dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        losses.append(float(loss))
    assert all(torch.tensor(losses).isfinite())
    # The scaler starts too high and adapts its scale within a few steps; only the last steps are checked.
    assert not any(map(torch.equal, before, training.layer.parameters()))
    for parameter in training.layer.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole(compiler: str) -> None:
    torch.compiler.reset()
    layer, x = gpu_layer(FL), moved(FL.inputs())
    masks = moved(draw_masks("partial", FL.batch, FL.lengths))
    noise = moved(draw_replacements(FL.inputs(), FL.experts))
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    found = []
    for function in (layer, compiled):
        leaves = [each.detach().requires_grad_() for each in x]
        outputs = named_outputs(function(leaves, masks, replacements=noise))
        total = outputs["logits"].sum() + outputs["losses"].sum()
        grads = torch.autograd.grad(total, [*leaves, *layer.parameters()])
        found.append([*outputs.values(), *grads])
    for got, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
