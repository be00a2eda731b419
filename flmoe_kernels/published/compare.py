"""Whether a fast layer computes the same as the layer that it would replace.

Both run in eval mode on the same inputs with the same replacement noise, and so does a float64 copy of the
original, from which the errors of both are measured. The original itself is never run, only copies, so that
none of its buffers, stored attention maps, gradients or modes changes.

Which rows of a sparse MLP are dropped is not compared: the original does not drop the same rows twice. Copies
run with capacities lifted and without random routing.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flmoe_kernels.layers.interaction_moe.architecture import LayerSpec, build_like
from flmoe_kernels.layers.routed_mlp.structure import RoutedSpec

from .agreement import Disagreement, Outputs, check_losses, collect, first_line, within_budget
from .calls import Case, bare_copy, few_samples, random_cases
from .convert import adopt
from .recognise import check_can_run

TIMED_CALLS = 5
RANDOM_TOKENS = 58
MAX_TOKENS = 512
# In roundings of a token's largest logit: exceeds the difference between two summation orders.
CLEAR_CHOICE = 8.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Largest absolute error per group of outputs against the original in float64; how many times
    faster inference ran, or None where the original does not run."""

    errors: Mapping[str, float]
    speed_up: float | None


def compare(layer: nn.Module, spec: LayerSpec | RoutedSpec, case: Case | None = None) -> Comparison:
    """Compare a layer with its fast replacement, within the error budgets of `agreement`.

    Interaction layers: every view, the weights, the losses and inference are compared, but not gate losses,
    because the original keeps only its last modality's. Sparse MLPs: outputs of tokens whose expert choice does
    not depend on rounding are compared.

    Args:
        layer: the original; not run and not changed.
        spec: its description.
        case: a call to compare on, its first samples only; random inputs, with and without masks,
            when None.

    Raises:
        Disagreement: with the reason.
        UnsupportedLayer: sparse MLPs of FastMoE's own code that are not on a CUDA GPU.
    """
    check_can_run(layer)
    original, exact = bare_copy(layer).eval(), bare_copy(layer).double().eval()
    fast = adopt(layer, spec).eval()
    for module in (original, exact, fast):
        _lift_capacity(module)
    with torch.no_grad(), torch.autocast(next(layer.parameters()).device.type, enabled=False):
        if isinstance(spec, LayerSpec):
            return _compare_layers(original, exact, fast, spec, case)
        return _compare_mlps(original, exact, fast, spec, case)


def _compare_layers(
    original: nn.Module, exact: nn.Module, fast: nn.Module, spec: LayerSpec, case: Case | None
) -> Comparison:
    """If the original does not run in its own dtype, the reference layer's error is used instead.

    With bfloat16 or float16 weights it does not run, because it adds float32 positions.
    """
    parameter = next(original.parameters())
    device, dtype = parameter.device, parameter.dtype
    given = random_cases(spec) if case is None else [few_samples(case, spec)]
    cases = [each.moved(device, dtype) for each in given]
    peer = original
    errors: dict[str, float] = {}
    for at in cases:
        noise = _noise(at, spec.num_experts)
        expected = _run_original(exact, at.moved(device, torch.float64), noise, spec)
        try:
            own = _run_original(peer, at, noise, spec)
        except Disagreement:
            if dtype not in (torch.bfloat16, torch.float16):
                raise
            peer = _reference_copy(original, spec)
            own = _run_original(peer, at, noise, spec)
        found = _run_fast(fast, at, noise, spec)
        now = {name: within_budget(name, found, own, expected, dtype) for name in expected.groups}
        now["losses"] = check_losses(found, expected, dtype)
        errors = {name: max(errors.get(name, 0.0), error) for name, error in now.items()}
    if peer is not original or not hasattr(original, "inference"):
        return Comparison(errors, None)
    layers: tuple[Any, Any] = (original, fast)
    calls = [partial(_call, each.inference, cases[0]) for each in layers]
    return Comparison(errors, _times_faster(calls[0], calls[1], cases[0].inputs[0].device))


def _compare_mlps(
    original: nn.Module, exact: nn.Module, fast: nn.Module, spec: RoutedSpec, case: Case | None
) -> Comparison:
    parameter = next(original.parameters())
    x = _tokens(case, spec).to(parameter)
    router: Any = adopt(exact, spec).get_submodule("gate")
    x = x[_clear_choices(router.clean_logits(x.double()), spec.top_k, parameter.dtype)]
    if not len(x):
        raise Disagreement("there is no token whose choice of experts does not hang on rounding")
    expected = _mlp_outputs(exact, x.double(), "its own forward")
    own = _mlp_outputs(original, x, "its own forward")
    found = _mlp_outputs(fast, x, "the fast module")
    error = within_budget("outputs", found, own, expected, parameter.dtype)
    ratio = _times_faster(partial(original, x), partial(fast, x), x.device)
    return Comparison({"outputs": error}, ratio)


def _lift_capacity(module: nn.Module) -> None:
    """Let no expert drop a row, and no row be dropped at random."""
    for part in module.modules():
        experts = getattr(part, "tot_expert", None)
        if experts is None:
            continue
        for name, value in (("capacity", (float(experts),) * 2), ("random_routing", False)):
            if name in vars(part):
                setattr(part, name, value)


class _GivenNoise(TorchFunctionMode):
    """Within it torch.randn_like returns the given tensors, in order."""

    def __init__(self, noise: Sequence[Tensor]) -> None:
        super().__init__()
        self.left = list(noise)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Other shapes than a sequence's (B, L, D) are a gate's own noise, which is 0 in eval mode.
        if func is not torch.randn_like or args[0].dim() != 3:
            return func(*args, **(kwargs or {}))
        if not self.left or self.left[0].shape != args[0].shape:
            raise Disagreement("draws other noise than one replacement per expert and modality")
        return self.left.pop(0)


def _noise(case: Case, num_experts: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(x.shape, generator=generator).to(x) for x in case.inputs]
        for _ in range(num_experts)
    ]


def _reference_copy(layer: nn.Module, spec: LayerSpec) -> nn.Module:
    reference = build_like(spec)
    reference.load_state_dict(layer.state_dict())
    _lift_capacity(reference)
    return reference.to(next(layer.parameters())).eval()


def _call(function: Callable[..., Any], case: Case) -> Any:
    """Call with masks where the signature has them: the older variant's layer has none."""
    if "masks" in inspect.signature(function).parameters:
        return function(list(case.inputs), case.masks)
    if case.masks is not None:
        raise Disagreement("was called with masks, which it does not take")
    return function(list(case.inputs))


def _run_original(layer: Any, case: Case, noise: list[list[Tensor]], spec: LayerSpec) -> Outputs:
    given = _GivenNoise([x.to(case.inputs[0].dtype) for expert in noise for x in expert])
    try:
        with given:
            result = _call(layer.forward, case)
        inferred = _call(layer.inference, case) if hasattr(layer, "inference") else None
    except Disagreement:
        raise
    except Exception as error:
        raise Disagreement(f"its own forward fails: {first_line(error)}") from error
    if given.left:
        raise Disagreement("does not draw one replacement with torch.randn_like per view")
    return collect(result, inferred, spec)


def _run_fast(layer: Any, case: Case, noise: list[list[Tensor]], spec: LayerSpec) -> Outputs:
    try:
        result = layer(list(case.inputs), case.masks, replacements=noise)
        inferred = layer.inference(list(case.inputs), case.masks)
    except Exception as error:
        raise Disagreement(f"the fast layer fails: {first_line(error)}") from error
    return collect(result, inferred, spec)


def _tokens(case: Case | None, spec: RoutedSpec) -> Tensor:
    """(N, D)."""
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
    """(N) bool: whether the gap between the last chosen expert and the next one exceeds rounding; logits (N, E).

    Rounding is relative to the token's own largest logit: a token of a large norm says nothing about the others.
    """
    if top_k == logits.shape[1] or not len(logits):
        return torch.ones_like(logits[:, 0], dtype=torch.bool)
    ordered = logits.sort(dim=1, descending=True).values
    rounding = CLEAR_CHOICE * torch.finfo(dtype).eps * logits.abs().amax(dim=1)
    # NaN is kept: the comparison then reports that the outputs are not finite.
    return ~(ordered[:, top_k - 1] - ordered[:, top_k] <= rounding)


def _mlp_outputs(module: Any, x: Tensor, whose: str) -> Outputs:
    try:
        result = module(x)
    except Exception as error:
        raise Disagreement(f"{whose} fails: {first_line(error)}") from error
    if not isinstance(result, Tensor) or result.shape != x.shape:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise Disagreement(f"{whose}: expected an output {tuple(x.shape)}, got {found}")
    return Outputs({"outputs": [result.double()]}, [], [])


def _times_faster(
    original: Callable[[], Any], fast: Callable[[], Any], device: torch.device
) -> float:
    """How many times faster one call is than the other, by medians of a few alternating calls; indicative."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(TIMED_CALLS + 1):
        for call, spent in zip((original, fast), seconds, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first call is a warm-up
                spent.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
