"""Two graphs of torch.compile serve all batch sizes and lengths, and torch.export takes dynamic sizes.

`make compatibility` runs these tests with other releases of torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from flmoe_kernels import InteractionMoE, PairInteractionMoE, RoutedMLP, swap
from tests.support.inputs import draw
from tests.support.layers import LayerCase
from tests.support.routed_layers import GATES

# Batch sizes and lengths of the first modality; the second has two tokens more. The first size is compiled as it
# is, the second with symbols for everything that has changed. As everywhere in torch, a size of 1, or sizes that
# are equal by chance in the second call only, would make a graph more.
SIZES = [
    (2, 5),
    (3, 6),
    (9, 4),
    (6, 8),
    (12, 3),
    (2, 19),
]
DENSE = LayerCase((5, 7), layers=2, sparse=True)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@dataclasses.dataclass(frozen=True)
class Model:
    """A module, a call of it, and its inputs for a batch size and a length."""

    module: nn.Module
    call: Callable[..., Any]
    inputs: Callable[[int, int], tuple[Tensor, ...]]


class Called(nn.Module):
    """The tensors that a call returns."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.layer, self.call = model.module, model.call

    # No *tensors: in torch 2.9 the checks of an exported program do not find the parts of a tuple.
    def forward(
        self, first: Tensor, second: Tensor | None = None, third: Tensor | None = None
    ) -> list[Tensor]:
        tensors = [x for x in (first, second, third) if x is not None]
        return [x for x in tree_leaves(self.call(self.layer, *tensors)) if isinstance(x, Tensor)]


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return draw(batch, length, 8, seed=length), draw(batch, length + 2, 8, seed=batch)


def valid(batch: int, length: int) -> Tensor:
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.6
    mask[:, 0] = True
    return mask


def routed(gate: str, masked: bool = False) -> Model:
    module = RoutedMLP(4, 8, 16, gate=gate, top_k=1 if gate == "SwitchGate" else 2)

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        return (tokens(batch, length)[0], *([valid(batch, length)] if masked else []))

    def call(layer: RoutedMLP, *args: Tensor) -> Any:
        return layer(*args), layer.gate_loss(), layer.last_topk_indices

    return Model(module, call, inputs)


def layer_of(gate: str | None) -> InteractionMoE:
    case = dataclasses.replace(DENSE, gate=gate, top_k=1 if gate == "SwitchGate" else 2)
    return InteractionMoE.adopt(case.reference(), backend="cpu")


def forward(gate: str | None) -> Model:
    return Model(layer_of(gate), lambda layer, x, y: layer([x, y]), tokens)


def swapped() -> Model:
    report = swap(nn.ModuleDict({"published": DENSE.reference()}))
    return Model(report.model["published"], lambda layer, x, y: layer([x, y]), tokens)


def inference(gate: str | None) -> Model:
    return Model(
        layer_of(gate),
        lambda layer, x, y, mask: layer.inference([x, y], [mask, None]),
        lambda batch, length: (*tokens(batch, length), valid(batch, length)),
    )


def pair(losses: bool = False) -> Model:
    return Model(
        PairInteractionMoE((8, 8), num_classes=3, rank=4, value_dim=4, token_outputs=True),
        lambda layer, x, y, mask: layer([x, y], [mask, None], interaction_losses=losses),
        lambda batch, length: (*tokens(batch, length), valid(batch, length)),
    )


MODELS: dict[str, Callable[[], Model]] = {
    **{gate: lambda gate=gate: routed(gate) for gate in GATES},  # type: ignore[misc]
    "masked": lambda: routed("GShardGate", masked=True),
    "dense": lambda: forward(None),
    "sparse": lambda: forward("GShardGate"),
    "swapped": swapped,
    "dense inference": lambda: inference(None),
    "sparse inference": lambda: inference("GShardGate"),
    "pairs": pair,
    "pairs with losses": lambda: pair(losses=True),
}
FAST = {("GShardGate", True), ("masked", True), ("dense", True), ("pairs", False)}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(MODELS, (True, False))
]


def results(function: nn.Module, layer: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs and, in training, the gradients of all parameters; random numbers are the same in every call."""
    torch.manual_seed(0)
    outputs = function(*inputs)
    if not layer.training:
        return outputs
    layer.zero_grad()
    sum(x.sum() for x in outputs if x.requires_grad).backward()  # type: ignore[union-attr]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
    return [*(x.detach() for x in outputs), *gradients]


@pytest.mark.parametrize(("name", "training"), CASES)
def test_two_graphs_serve_all_sizes(name: str, training: bool) -> None:
    model = MODELS[name]()
    layer = model.module.train(training)
    counter = CompileCounterWithBackend("aot_eager")
    eager = Called(model)
    compiled: Any = torch.compile(eager, fullgraph=True, backend=counter)
    for batch, length in SIZES:
        inputs = model.inputs(batch, length)
        expected = [x.clone() for x in results(eager, layer, inputs)]
        for got, want in zip(results(compiled, layer, inputs), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swapped", "sparse", "GShardGate", "pairs with losses"])
@torch._inductor.config.patch(fallback_random=True)
def test_code_of_inductor(name: str) -> None:
    """torch.compile with its defaults, but with the random numbers of eager mode."""
    model = MODELS[name]()
    eager = Called(model)
    compiled: Any = torch.compile(eager)
    for size in SIZES[:3]:
        inputs = model.inputs(*size)
        expected = [x.clone() for x in results(eager, model.module, inputs)]
        for got, want in zip(results(compiled, model.module, inputs), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "training"), CASES)
def test_exported_with_dynamic_sizes(name: str, training: bool) -> None:
    model = MODELS[name]()
    model.module.train(training)
    module = Called(model).train(training)
    batch, length, longer = Dim("batch", min=2), Dim("length", min=2), Dim("longer", min=2)
    inputs = model.inputs(3, 5)
    # The second input is the other modality, or a mask of the first.
    seconds = length if inputs[-1].dtype == torch.bool and len(inputs) == 2 else longer
    sizes = [{0: batch, 1: length}, {0: batch, 1: seconds}, {0: batch, 1: length}]
    program = torch.export.export(
        module, inputs, dynamic_shapes=tuple(sizes[: len(inputs)]), strict=False
    )
    exported = program.module()
    for size in ((3, 5), *SIZES[-4:]):
        arguments = model.inputs(*size)
        found = []
        for call in (module, exported):
            torch.manual_seed(0)
            found.append(call(*arguments))
        for got, want in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
