"""Tests of torch.func transforms, forward-mode AD and batched gradients, against reverse mode in plain PyTorch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from flmoe_kernels import BackendUnavailable, expert_attention, pair_moe, use_backend
from flmoe_kernels.layers.routed_mlp.collectives import sum_over_ranks
from flmoe_kernels.ops.routing.api import dispatch, limit
from tests.support.inputs import cumulative, draw
from tests.support.transform_cases import CASES, KINDS, PAIRS, TransformCase, assert_equal, numbers

Results = tuple[Sequence[Tensor], Sequence[Tensor]]
Function = Callable[..., Tensor]
NO_KERNEL_RULES = r"do not support .*; backend='reference' does"


@functools.cache
def jacobians(name: str) -> list[Tensor]:
    """Derivatives of every result with respect to every argument: reverse mode, row by row."""
    case = CASES[name]
    leaves = [x.clone().requires_grad_() for x in case.arguments]
    with use_backend("reference"):
        results = (case.plain or case.function)(*leaves)
        rows = [
            torch.autograd.grad(y, leaves, retain_graph=True, materialize_grads=True)
            for y in results
        ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def like(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(draw(*x.shape, dtype=torch.float64, seed=200 + i) for i, x in enumerate(tensors))


def weights(name: str, *shape: int) -> Tensor:
    return draw(*shape, len(jacobians(name)[0]), dtype=torch.float64, seed=300)


def derivative(name: str) -> Tensor:
    """The derivative in the direction like(arguments)."""
    jacobian = jacobians(name)
    parts = zip(jacobian, like(CASES[name].arguments), strict=True)
    return sum((j * v).flatten(1).sum(dim=1) for j, v in parts)  # type: ignore[return-value]


def gradient(name: str, cotangents: Tensor) -> list[Tensor]:
    return [torch.tensordot(cotangents, j, dims=1) for j in jacobians(name)]


def objective(name: str) -> Function:
    cotangents = weights(name)
    return lambda *x: CASES[name].function(*x) @ cotangents


def every(case: TransformCase) -> tuple[int, ...]:
    return tuple(range(len(case.arguments)))


def of_grad(name: str, case: TransformCase) -> Results:
    return grad(objective(name), every(case))(*case.arguments), gradient(name, weights(name))


def of_jvp(name: str, case: TransformCase) -> Results:
    return jvp(case.function, case.arguments, like(case.arguments))[1:], [derivative(name)]


def of_dual_level(name: str, case: TransformCase) -> Results:
    """Tangents on all arguments, parameters included, which require gradients, too."""
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_() for x in case.arguments]
        pairs = zip(leaves, like(leaves), strict=True)
        result = case.function(*(forward_ad.make_dual(x, v) for x, v in pairs))
        tangent = forward_ad.unpack_dual(result).tangent
    return [tangent.detach()], [derivative(name)]


def of_hessian(name: str, case: TransformCase) -> Results:
    def squares(function: Function) -> Function:
        return lambda *x: function(*x, *case.arguments[case.few :]).square().sum()

    x = case.arguments[: case.few]
    found = hessian(squares(case.function), tuple(range(case.few)))(*x)
    with use_backend("reference"):
        want = torch.autograd.functional.hessian(squares(case.plain or case.function), x)
    return [y for row in found for y in row], [y for row in want for y in row]


def of_vmap(name: str, case: TransformCase) -> Results:
    """Every argument batched, also along its last dimension, and the first or the last argument alone."""
    stacked = [torch.stack([x, *like([x]), x + 0.1]) for x in case.arguments]
    last = [x.movedim(0, -1) for x in stacked]
    rest = case.arguments[1:]
    others = case.arguments[:-1]
    found = [
        vmap(case.function)(*stacked),
        vmap(case.function, in_dims=-1)(*last),
        vmap(case.function, in_dims=(0, *[None] * len(rest)))(stacked[0], *rest),
        vmap(case.function, in_dims=(*[None] * len(others), 0))(*others, stacked[-1]),
    ]
    together = torch.stack([case.function(*x) for x in zip(*stacked, strict=True)])
    want = [
        together,
        together,
        torch.stack([case.function(x, *rest) for x in stacked[0]]),
        torch.stack([case.function(*others, x) for x in stacked[-1]]),
    ]
    return found, [x.detach() for x in want]


def of_gradients_per_sample(name: str, case: TransformCase) -> Results:
    inputs, parameters = case.arguments[: case.few], case.arguments[case.few :]
    stacked = [torch.stack([x, x + 0.1]) for x in inputs]
    of_all = grad(objective(name), every(case))
    found = vmap(of_all, in_dims=(*[0] * case.few, *[None] * len(parameters)))(
        *stacked, *parameters
    )
    each = [of_all(*x, *parameters) for x in zip(*stacked, strict=True)]
    return found, [torch.stack(x) for x in zip(*each, strict=True)]


TRANSFORMS: dict[str, Callable[[str, TransformCase], Results]] = {
    "grad": of_grad,
    "jvp": of_jvp,
    "dual_level": of_dual_level,
    "hessian": of_hessian,
    "vmap": of_vmap,
    "vmap of grad": of_gradients_per_sample,
}


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        pair
        for pair in itertools.product(CASES, TRANSFORMS)
        if pair[1] != "hessian" or "Interaction" not in pair[0]
    ],
)
def test_a_transform(name: str, transform: str) -> None:
    """Without a requested backend every operator and layer is right under every transform."""
    assert_equal(*TRANSFORMS[transform](name, CASES[name]))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("pair_map", "top_pairs")])
def test_batched_gradients_of_a_graph_of_the_kernels(name: str) -> None:
    """torch.autograd.grad with is_grads_batched runs the kernels' backward under vmap."""
    leaves = [x.clone().requires_grad_() for x in CASES[name].arguments]
    results, cotangents = CASES[name].function(*leaves), weights(name, 3)
    options = {"is_grads_batched": True, "allow_unused": True}
    found = torch.autograd.grad(results, leaves, cotangents, **options)
    want = gradient(name, cotangents)
    assert_equal(
        [torch.zeros_like(y) if x is None else x for x, y in zip(found, want, strict=True)], want
    )


@pytest.mark.parametrize("name", [name for name in CASES if "FusionTransformer" not in name])
@pytest.mark.parametrize("transform", ["grad", "jvp", "dual_level", "vmap"])
def test_a_requested_backend_refuses_transforms(name: str, transform: str) -> None:
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match=NO_KERNEL_RULES):
        TRANSFORMS[transform](name, CASES[name])


Q, K, A, C = numbers(*PAIRS)


def accumulated(q: Tensor, backend: str | None = None) -> Tensor:
    return pair_moe(q, K, A, C, kinds=KINDS, backend=backend).y


def test_an_open_level_does_not_concern_tensors_without_tangents() -> None:
    """torch's levels belong to the process: calls of other threads with a requested backend go on."""
    want = accumulated(Q, "cpu")
    with forward_ad.dual_level():
        assert torch.equal(accumulated(Q, "cpu"), want)
        with pytest.raises(BackendUnavailable, match=r"^flmoe::pair_moe: .* forward-mode AD"):
            accumulated(forward_ad.make_dual(Q, Q), "cpu")


def test_second_derivatives_in_reverse_mode() -> None:
    """Refused by the kernels, right with the reference, for torch.autograd.functional and gradgradcheck."""
    functional = torch.autograd.functional

    def squares(q: Tensor) -> Tensor:
        return accumulated(q).square().sum()

    once = r"differentiable once; backend='reference'"
    for call in (functional.hvp, functional.vhp):
        with pytest.raises(NotImplementedError, match=once):
            call(squares, Q, Q)
    with pytest.raises(NotImplementedError, match=once):
        functional.jvp(accumulated, Q, Q)
    with use_backend("reference"):
        want = functional.hvp(squares, Q, Q)[1]
        tangent = functional.jvp(accumulated, Q, Q)[1]
        assert torch.autograd.gradgradcheck(accumulated, (Q.clone().requires_grad_(),))
    assert_equal([jvp(grad(squares), (Q,), (Q,))[1]], [want])
    assert_equal([jvp(accumulated, (Q,), (Q,))[1]], [tangent])
    forward = {"strategy": "forward-mode", "vectorize": True}
    matrix = functional.jacobian(accumulated, Q, **forward)
    assert_equal([matrix], [functional.jacobian(accumulated, Q)])


def test_indices_under_vmap() -> None:
    index = torch.tensor([[[0, 1], [2, -1], [1, 0]], [[2, 2], [0, 1], [1, -1]]])
    found = vmap(lambda i: (*dispatch(i, 3), limit(i, 3, capacity=1)))(index)
    each = [(*dispatch(i, 3), limit(i, 3, capacity=1)) for i in index]
    for actual, expected in zip(found, zip(*each, strict=True), strict=True):
        assert torch.equal(actual, torch.stack(expected))


def test_expert_parallelism_refuses_transforms() -> None:
    (x,) = numbers((3,))
    message = (
        "^group: expert parallelism supports neither torch.func transforms nor forward-mode AD"
    )
    with pytest.raises(NotImplementedError, match=message):
        grad(lambda x: sum_over_ranks(x).sum())(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        sum_over_ranks(forward_ad.make_dual(x, x))


def test_batched_lengths_are_refused() -> None:
    q = draw(3, 1, 2)
    lengths = torch.stack([cumulative([3]), cumulative([2])])
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected the same .* got a batched"):
        vmap(lambda cu: expert_attention(q, q, q, cu))(lengths)


def test_compiled_transforms() -> None:
    def derivative(q: Tensor) -> Tensor:
        return grad(lambda q: accumulated(q).square().sum())(q)

    torch.compiler.reset()
    found = torch.compile(derivative, fullgraph=True, backend="aot_eager")(Q)
    assert_equal([found], [derivative(Q)])
