"""Comparison of a fast layer with the layer that it replaces.

Both layers and a float64 copy of the original run in eval mode on the same inputs with the same replacement
noise. The errors of both are measured against the float64 copy. The original itself is never run, only copies,
so its buffers, stored attention maps, gradients and modes do not change.

The dropped rows of a sparse MLP are not compared, because the original drops different rows in every run. Copies
run without capacity limits and without random routing.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.core.dtypes import without_autocast
from flmoe_kernels.layers.interaction_moe.architecture import LayerSpec
from flmoe_kernels.layers.routed_mlp.structure import RoutedSpec

from .agreement import Disagreement, check_losses, within_budget
from .calls import Case, bare_copy, few_samples, random_cases
from .convert import adopt
from .differences import Difference, measure
from .recognise import Spec, check_can_run
from .runs import call, lift_capacity, run

TIMED_CALLS = 5
RANDOM_TOKENS = 58
MAX_TOKENS = 512
# In units of rounding of a token's largest logit; larger than the difference between two summation orders.
CLEAR_CHOICE = 8.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Largest absolute error per group of outputs, against the original in float64; speed-up of
    inference, None if the original does not run; behaviours that differ by design."""

    errors: Mapping[str, float]
    speed_up: float | None
    differences: tuple[Difference, ...] = ()


def compare(layer: nn.Module, spec: Spec, case: Case | None = None) -> Comparison:
    """Compare a layer with its fast replacement, within the error budgets of `agreement`.

    Interaction layers: every view, the weights, the losses and inference are compared, but not gate losses,
    because the original keeps only those of the last modality. Fusion models: logits and latents. Sparse
    MLPs: only outputs of tokens whose expert choice does not depend on rounding.

    case: the call to compare, of which the first samples are used; None: random inputs, with and without masks.
    Raises Disagreement: the layers differ or cannot be compared; the message is the reason.
    """
    check_can_run(layer)
    original, exact = bare_copy(layer).eval(), bare_copy(layer).double().eval()
    fast = adopt(layer, spec).eval()
    for module in (original, exact, fast):
        lift_capacity(module)
    with torch.no_grad(), without_autocast(next(layer.parameters()).device):
        if isinstance(spec, RoutedSpec):
            cases = [Case([_clear_tokens(_tokens(case, spec), layer, spec)], None)]
        else:
            cases = random_cases(spec) if case is None else [few_samples(case, spec)]
        result = _compare(original, exact, fast, spec, cases)
        return dataclasses.replace(result, differences=measure(layer, spec, cases[0], case))


def _compare(
    original: nn.Module, exact: nn.Module, fast: nn.Module, spec: Spec, cases: list[Case]
) -> Comparison:
    """Compare two layers. If the original does not run, the reference layer's error is used instead.

    With bfloat16 or float16 weights the original does not run, because it adds float32 positions.
    """
    parameter = next(original.parameters())
    device, dtype = parameter.device, parameter.dtype
    cases = [x.moved(device, dtype) for x in cases]
    peer: Any = original
    errors: dict[str, float] = {}
    for at in cases:
        expected = run(exact, at.moved(device, torch.float64), spec)
        try:
            own = run(peer, at, spec)
        except Disagreement:
            if dtype not in (torch.bfloat16, torch.float16):
                raise
            peer = adopt(original, spec)
            peer.backend = REFERENCE
            own = run(peer, at, spec)
        actual = run(fast, at, spec)
        now = {name: within_budget(name, actual, own, expected, dtype) for name in expected.groups}
        if isinstance(spec, LayerSpec):
            now["losses"] = check_losses(actual, expected, dtype)
        errors = {name: max(errors.get(name, 0.0), error) for name, error in now.items()}
    method = "inference" if isinstance(spec, LayerSpec) else "forward"
    if peer is not original or not hasattr(original, method):
        return Comparison(errors, None)
    calls = [
        partial(function, cases[0].inputs[0])
        if isinstance(spec, RoutedSpec)
        else partial(call, function, cases[0])
        for function in (getattr(original, method), getattr(fast, method))
    ]
    return Comparison(errors, _times_faster(calls[0], calls[1], device))


def _clear_tokens(x: Tensor, layer: nn.Module, spec: RoutedSpec) -> Tensor:
    """The tokens whose choice of experts does not depend on rounding."""
    parameter = next(layer.parameters())
    router: Any = adopt(bare_copy(layer).double(), spec).get_submodule("gate")
    x = x.to(parameter)
    x = x[_clear_choices(router.clean_logits(x.double()), spec.top_k, parameter.dtype)]
    if not len(x):
        raise Disagreement(
            "for every token, two gate logits are so close that rounding decides the expert"
        )
    return x


def _tokens(case: Case | None, spec: RoutedSpec) -> Tensor:
    """Tokens (N, D) of the call, or random tokens."""
    if case is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(RANDOM_TOKENS, spec.d_model, generator=generator)
    shapes = [tuple(x.shape) for x in case.inputs]
    if len(shapes) != 1 or not shapes[0] or shapes[0][-1] != spec.d_model:
        raise Disagreement(
            f"was called with inputs of shapes {shapes}, expected one (..., {spec.d_model})"
        )
    return case.inputs[0].reshape(-1, spec.d_model)[:MAX_TOKENS]


def _clear_choices(logits: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """Whether the gap between the last chosen expert and the next exceeds rounding: (N,) bool of logits (N, E).

    Rounding is relative to the largest logit of the same token, because norms of tokens differ.
    """
    if top_k == logits.shape[1] or not len(logits):
        return torch.ones_like(logits[:, 0], dtype=torch.bool)
    ordered = logits.sort(dim=1, descending=True).values
    rounding = CLEAR_CHOICE * torch.finfo(dtype).eps * logits.abs().amax(dim=1)
    # NaN is kept: the comparison then reports that the outputs are not finite.
    return ~(ordered[:, top_k - 1] - ordered[:, top_k] <= rounding)


def _times_faster(
    original: Callable[[], Any], fast: Callable[[], Any], device: torch.device
) -> float:
    """Ratio of the median times of a few alternating calls, original over fast; only indicative."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(TIMED_CALLS + 1):
        for compute, spent in zip((original, fast), seconds, strict=True):
            start = time.perf_counter()
            compute()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first call is a warm-up
                spent.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
