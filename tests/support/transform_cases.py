"""Small float64 calls of every operator and layer, for tests of torch.func and forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from flmoe_kernels import (
    FusionTransformer,
    InteractionMoE,
    expert_attention,
    pair_map,
    pair_moe,
    routed_mlp,
    top_pairs,
)
from flmoe_kernels.ops.routing.api import gate
from tests.support.inputs import cumulative, draw, draw_replacements, make_seed
from tests.support.layers import LayerCase
from tests.support.pair_layers import pair_inputs, pair_layer
from tests.support.routed_layers import GATES, make

KINDS = ("unique_a", "unique_b", "synergy", "redundancy")
MASK = torch.tensor([[True, True, False], [True, True, True]])
INDEX = torch.tensor([[0, 1], [2, -1], [1, 0]])
TARGET = torch.tensor([0, 1])


@dataclass(frozen=True)
class TransformCase:
    """A function of float64 tensors that returns one vector.

    few: number of the first tensors, the inputs, with respect to which whole Jacobians are computed; a layer's
        parameters follow.
    plain: the same function in plain PyTorch; None for `function` itself with the reference backend.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    few: int
    plain: Callable[..., Tensor] | None = None


def vector(results: Any) -> Tensor:
    """All floating-point results in one vector."""
    leaves = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
    return torch.cat([x.reshape(-1) for x in leaves if x.dtype.is_floating_point])


def numbers(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(draw(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes))


def assert_equal(found: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert any(bool(x.any()) for x in want), "the test could not distinguish the result from zeros"
    for actual, expected in zip(found, want, strict=True):
        size = max(float(expected.detach().abs().max()), 1.0) if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * size)


def operator(function: Callable[..., Any], *shapes: tuple[int, ...]) -> TransformCase:
    return TransformCase(lambda *x: vector(function(*x)), numbers(*shapes), len(shapes))


def layer_case(
    layer: nn.Module, inputs: Sequence[Tensor], call: Callable[..., Any] | None = None
) -> TransformCase:
    """A layer as a function of its inputs and all of its parameters; call(module, *inputs)."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *x: Tensor) -> Any:
            return self.layer(*x) if call is None else call(self.layer, *x)

    module, count = Called(), len(inputs)
    names = [name for name, _ in module.named_parameters()]

    def function(*x: Tensor) -> Tensor:
        parameters = dict(zip(names, x[count:], strict=True))
        return vector(functional_call(module, parameters, x[:count]))

    parameters = [p.detach().clone() for p in module.parameters()]
    return TransformCase(function, (*inputs, *parameters), count)


def by_sorting(*x: Tensor) -> Tensor:
    """The values of top_pairs from the dense map."""
    phi = pair_map(*x, kinds=KINDS, backend="reference")
    flat = [
        y.flatten(start).sort(descending=True).values for y, start in ((phi, 2), (phi.sum(1), 1))
    ]
    return vector([y[..., :3] for y in flat])


def with_gate_loss(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return mlp(x), mlp.gate_loss()


def interaction_case(case: LayerCase, inference: bool = False) -> TransformCase:
    layer = InteractionMoE.adopt(case.reference(torch.float64)).eval()
    inputs = case.inputs(torch.float64)
    masks = None if case.compat == "i2moe" else [MASK, None]
    if inference:
        return layer_case(layer, inputs, lambda layer, *x: layer.inference(list(x), masks))
    noise = draw_replacements(inputs, case.experts)

    def call(layer: Any, *x: Tensor) -> Any:
        """Weights, logits, losses and gate losses."""
        results = layer(list(x), masks, replacements=noise)
        return results[1:5] if case.sparse else results[1:4]

    return layer_case(layer, inputs, call)


def fusion_case(**options: Any) -> TransformCase:
    torch.manual_seed(0)
    fusion = FusionTransformer(2, 4, 3, num_layers=1, num_heads=2, **options).double().eval()
    inputs = numbers((2, 3, 4), (2, 3, 4))
    return layer_case(fusion, inputs, lambda fusion, *x: fusion(list(x), [MASK, None]))


def pair_case(**options: Any) -> TransformCase:
    losses = "token_outputs" not in options
    inputs = pair_inputs((3, 2))
    noise = pair_inputs((3, 2), seed=60) if losses else None

    def call(layer: Any, *x: Tensor) -> Any:
        return layer(list(x), [MASK, None], interaction_losses=losses, replacements=noise)

    return layer_case(pair_layer(**options), inputs, call)


PAIRS = ((2, 4, 3, 2), (2, 4, 2, 2), (2, 4, 3, 2), (2, 4, 2, 2))
SMALL = {"dim": 4, "batch": 2, "lengths": (3, 3)}
SPARSE: dict[str, Any] = {"gate": "GShardGate", "mlp_experts": 3, "sparse": True}
CASES: dict[str, TransformCase] = {
    "pair_moe": operator(
        lambda q, k, a, c, bias: pair_moe(
            q, k, a, c, kinds=KINDS, gate_bias=bias, mask_a=MASK, top_k=3
        ),
        *PAIRS,
        (4,),
    ),
    "pair_moe pool": operator(
        lambda q, k, a, c: pair_moe(q, k, a, c, kinds=KINDS, reduce="pool"), *PAIRS
    ),
    "pair_map": operator(
        lambda q, k, a, c, head: pair_map(q, k, a, c, head, kinds=KINDS, target=TARGET),
        *PAIRS,
        (4, 2, 2),
    ),
    "top_pairs": TransformCase(
        lambda *x: vector(top_pairs(*x, kinds=KINDS, n_pairs=3)),
        numbers(*PAIRS, (4, 2)),
        5,
        by_sorting,
    ),
    "gate": operator(lambda logits: gate(logits, 2, capacity=2).weight, (5, 4)),
    "gate over all": operator(lambda logits: gate(logits, 2, over="all").weight, (5, 4)),
    "routed_mlp": operator(
        lambda x, weight, *w: routed_mlp(x, INDEX, weight, *w),
        *((3, 2), (3, 2), (4, 3, 2), (4, 3), (4, 2, 3), (4, 2)),
    ),
    "routed_mlp gated": operator(
        lambda x, weight, *w: routed_mlp(x, INDEX, weight, *w[:4], w_gate=w[4], act="silu"),
        *((3, 2), (3, 2), (4, 3, 2), (4, 3), (4, 2, 3), (4, 2), (4, 3, 2)),
    ),
    "expert_attention": operator(
        lambda q, k, v: expert_attention(
            q, k, v, cumulative([2, 3]), dropout_p=0.3, seed=make_seed()
        ),
        *((5, 2, 2),) * 3,
    ),
    **{
        f"RoutedMLP {name}": layer_case(
            make(name).double().eval(), numbers((3, 16)), with_gate_loss
        )
        for name in GATES
    },
    "FusionTransformer": fusion_case(),
    "FusionTransformer sparse": fusion_case(mlp_sparse=True, num_experts=3),
    "InteractionMoE": interaction_case(LayerCase(**SMALL)),
    "InteractionMoE i2moe": interaction_case(LayerCase(compat="i2moe", **SMALL)),
    "InteractionMoE sparse": interaction_case(LayerCase(**SMALL, **SPARSE)),
    "InteractionMoE inference": interaction_case(LayerCase(**SMALL), inference=True),
    "PairInteractionMoE": pair_case(),
    "PairInteractionMoE tokens": pair_case(token_outputs=True),
}
