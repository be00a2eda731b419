"""Comparison of GPU kernels with the reference before their first use.

One tiny case per operator, forward and backward. Widths are those of the published models, so that Triton need not
compile the same kernels again for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE, TRITON
from flmoe_kernels.core.triton.tuning import autotune
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.parts import UnsupportedLayer
from flmoe_kernels.ops.interaction_losses import interaction_losses
from flmoe_kernels.ops.routing.api import gate

from .cases import BOTH, Case
from .check import WrongAnswer, compare_with
from .operators import draws, expert_attention, interaction_moe, pair_moe, routed_mlp, routing
from .prepared import Prepared, prepare_function
from .registry import words_of
from .shapes import LayerShape, PairShape, RoutedShape, Shape, is_cuda

_LAYER = LayerShape("first_use", 2, (5, 3), ((1, 5), None), 256, 4, 2, 2)
_PAIRS = PairShape("first_use", 2, 33, 17)
_ROUTED = RoutedShape("first_use", 37, 256, 512, 4, 2)
# Added to the reweighting's hidden layer, so that no ReLU is near 0, where rounding changes gradients.
_POSITIVE = 16.0
# Scale of the latents; small, so that all triplet losses are positive.
_NEAR = 0.05


def _layer(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    def adopt(reference: Any) -> Any:
        with torch.no_grad():
            reference.reweight.mlp.network[0].bias.add_(_POSITIVE)
        return reference if name == REFERENCE else InteractionMoE.adopt(reference, backend=name)

    return interaction_moe.prepare_layer(case, adopt, dtype)


def _losses(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    """The interaction losses of a PairInteractionMoE, which run on the backend of its pairs."""
    latents = draws.draw(4, 3, 2, 64, generator=draws.generator_of(case.device), scale=_NEAR)
    leaves = {"latents": draws.place(case, latents, dtype)}

    def function(latents: Tensor) -> Mapping[str, Tensor]:
        return {"losses": interaction_losses(latents, name)}

    return prepare_function(function, leaves, case.phase, {"losses": ((4,), dtype)})


def _gate(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    """The gate; without a capacity, because a capacity would replace the weights."""
    logits = draws.draw(37, 4, generator=draws.generator_of(case.device))
    leaves = {"logits": draws.place(case, logits, dtype)}

    def function(logits: Tensor) -> Mapping[str, Tensor]:
        return gate(logits, 2, backend=name)._asdict()

    return prepare_function(function, leaves, case.phase, {"weight": ((37, 2), dtype)})


Make = Callable[[Case, str, torch.dtype], Prepared]
_CASES: dict[str, list[tuple[Make, Shape, str]]] = {
    "expert_attention": [(expert_attention.prepare, _LAYER, "dropout")],
    "interaction_moe": [(_layer, _LAYER, "")],
    "pair_moe": [(pair_moe.prepare, _PAIRS, "none"), (_losses, _PAIRS, "none")],
    "routed_mlp": [(routed_mlp.prepare, _ROUTED, "bias")],
    "routing": [(_gate, _ROUTED, ""), (routing.prepare, _ROUTED, "")],
}


def failure(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """Return the reason why the kernels of `op` must not be used, or "".

    Errors must be within `core.error_budget`. Runs in a thread of its own, whose CUDA device it sets. Errors
    of the reference or the allocator say nothing about the kernels and are raised.
    """
    gpu = [device] if is_cuda(str(device)) else []
    if gpu:
        torch.cuda.set_device(device)
    low_dtype = _precision(backend, dtype, device)
    with autotune(False), torch.random.fork_rng(devices=gpu):
        for make, shape, variant in _CASES[op]:
            case = Case(op, shape, BOTH, dtype, str(device), variant)
            exact, low = (_results(make, case, REFERENCE, x) for x in (torch.float64, low_dtype))
            try:
                compare_with(case, backend, _results(make, case, backend, dtype), low, exact)
            except (torch.OutOfMemoryError, UnsupportedLayer):  # the latter from global hooks
                raise
            except WrongAnswer as error:
                return str(error)
            except Exception as error:
                return f"{type(error).__name__}: {words_of(error)}"
    return ""


def calls(checked: Iterable[tuple[str, torch.dtype]]) -> Iterator[Callable[[], object]]:
    """Calls of the Triton kernels in the cases of operators and dtypes, on CPU tensors, for `warmup`."""
    for op, dtype in checked:
        for make, shape, variant in _CASES[op]:
            yield partial(
                _results, make, Case(op, shape, BOTH, dtype, "cpu", variant), TRITON, dtype
            )


def _precision(backend: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the reference that has the rounding errors of the kernels: float16 for TF32, which has the same
    mantissa and which torch may not use for small products."""
    if backend == TRITON and is_cuda(str(device)) and dtype == torch.float32:
        from flmoe_kernels.core.triton.launches import matrix_precision

        return torch.float16 if matrix_precision(dtype, device) == "tf32" else dtype
    return dtype


def _results(make: Make, case: Case, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: x.cpu() for key, x in make(case, name, dtype).outputs().items()}
