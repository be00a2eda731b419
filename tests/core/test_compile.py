"""Tests of torch.compile without graph breaks and of torch.export, against eager mode."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from flmoe_kernels import (
    InteractionMoE,
    expert_attention,
    pair_map,
    pair_moe,
    top_pairs,
    use_backend,
)
from flmoe_kernels.core.backend import choose
from tests.support.inputs import (
    cumulative,
    draw,
    draw_masks,
    draw_replacements,
    gradients,
    make_seed,
)
from tests.support.layers import LayerCase, outputs_and_gradients

FL = LayerCase((5, 4), dim=8, layers=2, batch=2, sparse=True)
I2 = LayerCase((3, 3), "i2moe", dim=8, batch=2)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fast_layer(case: LayerCase) -> InteractionMoE:
    return InteractionMoE.adopt(case.reference(), backend="cpu")


class Whole(nn.Module):
    """A compiled layer that shares the plain layer's parameters, under the same names."""

    def __init__(self, layer: nn.Module, backend: str, dynamic: bool | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.named_parameters(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-5, msg=name)


def attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return expert_attention(q, k, v, cu, dropout_p=0.5, seed=seed, return_lse=True)


@pytest.mark.parametrize(("shape", "dynamic"), [((12, 2, 5), False), ((3, 12, 2, 5), True)])
def test_expert_attention(shape: tuple[int, ...], dynamic: bool) -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (12, 9):
        sizes = (*shape[:-3], rows, *shape[-2:])
        qkv = [draw(*sizes, seed=i).requires_grad_() for i in range(3)]
        rest = (cumulative([4, 0, rows - 5]), make_seed(rows))
        results = []
        for call in (compiled, attention):
            out, lse = call(*qkv, *rest)
            results.append([out, lse, *gradients([out], qkv)])
        assert all(map(torch.equal, *results))
    other = compiled(*qkv, rest[0], make_seed(1))[0]
    assert not torch.equal(other, results[0][0]), "the seed was baked into the graph"


def test_runs_out_of_range_are_refused_in_compiled_code_too() -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q = draw(6, 1, 4)
    for bounds in ([0, 9], [0, 4, 2], [-3, 6]):
        with pytest.raises(ValueError, match="cu_seqlens: expected values that"):
            compiled(q, q, q, torch.tensor(bounds, dtype=torch.int32), make_seed())


@pytest.mark.parametrize(("reduce", "dynamic"), [("none", False), ("pool", True)])
def test_pair_moe(reduce: str, dynamic: bool) -> None:
    kinds = ("unique_a", "synergy", "null")

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, a, c, bias, mask, head = tensors
        options: dict[str, Any] = {"kinds": kinds, "gate_bias": bias, "mask_b": mask, "top_k": 2}
        y, mass = pair_moe(q, k, a, c, **options, reduce=reduce)
        detached = [x.detach() for x in (q, k, a, c)]
        options["gate_bias"] = bias.detach()
        phi = pair_map(*detached, head, **options)
        return y, mass, phi, *top_pairs(*detached, head, n_pairs=3, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 8):
        shapes = [(2, 3, rows, 4), (2, 3, 7, 4), (2, 3, rows, 6), (2, 3, 7, 6), (3,)]
        leaves = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        rest = (torch.arange(14).view(2, 7) % 4 != 1, draw(3, 6, seed=9))
        results = []
        for function in (compiled, call):
            out = function(*leaves, *rest)
            results.append([*out, *gradients(out[:2], leaves)])
        assert all(map(torch.equal, *results))


def test_a_negative_target_is_refused_in_compiled_code_too() -> None:
    q, head = draw(2, 1, 3, 4), draw(1, 4, 5)

    def call(target: Tensor) -> Tensor:
        return pair_map(q, q, q, q, head, kinds=["synergy"], target=target)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([4, 0]))
    for target in ([-1, 0], [0, 5]):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            compiled(torch.tensor(target))


@pytest.mark.parametrize(
    "case",
    [
        dataclasses.replace(FL, masks="mixed"),
        dataclasses.replace(FL, masks="padded_sample", layers=1, gate="GShardGate", capacity=0.5),
        I2,
    ],
    ids=str,
)
def test_layer(case: LayerCase) -> None:
    x, layer = case.inputs(), fast_layer(case)
    masks = draw_masks(case.masks, case.batch, case.lengths)
    noise = draw_replacements(x, case.experts)
    expected = outputs_and_gradients(layer, x, masks, noise)
    compiled = Whole(layer, "aot_eager")
    found = outputs_and_gradients(compiled, x, masks, noise)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    # Negative control: the comparison detects another input.
    other = outputs_and_gradients(compiled, [x[0] + 0.1, x[1]], masks, noise)
    with pytest.raises(AssertionError):
        assert_same(other[0], expected[0])


class Outputs(nn.Module):
    """All outputs of a layer with masks and constant replacements."""

    def __init__(self, layer: InteractionMoE, replacements: Any) -> None:
        super().__init__()
        self.layer, self.replacements = layer, replacements

    def forward(self, x: Tensor, y: Tensor, mask_x: Tensor, mask_y: Tensor) -> list[Tensor]:
        outputs = self.layer([x, y], [mask_x, mask_y], replacements=self.replacements)
        return tree_leaves(outputs)


@pytest.mark.parametrize("how", ["compile", "export", "trace"])
@torch.no_grad()
def test_forward_without_gradients_omits_masked_tokens(how: str) -> None:
    """A graph learns the number of valid tokens only when it runs."""
    case = LayerCase((5, 4), dim=8, layers=2, batch=3)
    x = case.inputs(torch.float64)
    module = Outputs(fast_layer(case).double().eval(), draw_replacements(x, case.experts))
    masks = [torch.ones(3, length, dtype=torch.bool) for length in case.lengths]
    if how == "export":
        program = torch.export.export(module, (*x, *masks), strict=False).module()
    elif how == "trace":
        program = torch.jit.trace(module, (*x, *masks))
    else:
        program = torch.compile(module, fullgraph=True, backend="aot_eager")
    for valid in (5, 2, 0):
        masks[0][2] = torch.arange(5) < valid
        for got, want in zip(program(*x, *masks), module(*x, *masks), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_training_with_dropout_and_fresh_noise() -> None:
    """Random numbers in the graph are finite, new in every call, and repeated by torch.manual_seed."""
    case = dataclasses.replace(FL, dropout=0.5)
    compiled = Whole(fast_layer(case), "aot_eager")
    x = case.inputs()

    def call(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(seed)
        return outputs_and_gradients(compiled, x, None, None)

    first, again, other = call(1), call(1), call(2)
    assert all(value.isfinite().all() for value in (*first[0].values(), *first[1].values()))
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(first[0]["expert_logits"], other[0]["expert_logits"])
    state = torch.get_rng_state()
    outputs_and_gradients(compiled, x, None, None)
    assert not torch.equal(torch.get_rng_state(), state)


def gated(x: Tensor) -> Tensor:
    return pair_moe(x, x, x, x, kinds=("unique_a", "synergy")).y


def backend_of(graph: GraphModule) -> str:
    targets = {str(node.target) for node in graph.graph.nodes}
    return "cpu" if "flmoe.pair_moe" in targets else "reference"


def test_another_choice_of_the_backend_is_compiled_again() -> None:
    """Compiled code follows use_backend around it, of the thread that calls it."""
    compiled: list[str] = []

    def record(graph: GraphModule, _inputs: Any) -> GraphModule:
        compiled.append(backend_of(graph))
        return graph

    function = torch.compile(gated, fullgraph=True, backend=record)
    x = torch.randn(2, 2, 5, 8)
    function(x)
    with use_backend("reference"):
        function(x)
        assert compiled == ["cpu", "reference"]
        thread = threading.Thread(target=lambda: function(x))
        thread.start()
        thread.join()
    function(x)
    with use_backend("reference"):
        function(x)
    assert compiled == ["cpu", "reference"], "a choice was compiled twice"
    unavailable = pytest.raises(torch._dynamo.exc.Unsupported, match="'triton' was requested")
    with use_backend("triton"), unavailable:
        function(x)


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.7",
    reason="torch.compile traces no function with contextlib.contextmanager: a graph break",
)
def test_a_block_inside_and_calls_after_it() -> None:
    """A traced block ends where it ends, alone, nested, and within a block around the compiled function."""

    def nested(x: Tensor) -> tuple[str, ...]:
        seen = [choose("pair_moe", x)]
        with use_backend("reference"):
            seen.append(choose("pair_moe", x))
            with use_backend("cpu"):
                seen.append(choose("pair_moe", x))
            seen.append(choose("pair_moe", x))
        return (*seen, choose("pair_moe", x))

    x = torch.randn(2)
    function = torch.compile(nested, fullgraph=True, backend="eager")
    for _ in range(2):
        assert function(x) == nested(x) == ("cpu", "reference", "cpu", "reference", "cpu")
    with use_backend("reference"):
        assert (
            function(x) == nested(x) == ("reference", "reference", "cpu", "reference", "reference")
        )
    assert choose("pair_moe", x) == "cpu"
