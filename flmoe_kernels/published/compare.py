"""Whether a fast layer computes what the layer that it is to replace computes.

Both run on the same inputs with the same replacement noise, and so does a float64 copy of the
original, which tells how far either is from exact. The original is only ever run as a copy, so that
nothing of it changes: no buffer, no stored attention map, no gradient, no mode.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flmoe_kernels.layers.interaction_moe.architecture import LayerSpec, build_like

from .copies import check_can_run, lift_capacity
from .outputs import (
    Disagreement,
    Outputs,
    check_fast_losses,
    check_own_losses,
    collect,
    first_line,
    largest,
    within_budget,
)

MAX_SAMPLES = 4
RANDOM_LENGTHS = (17, 12, 7, 13, 5)
TIMED_CALLS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the layer: M sequences (B, L_m, D), and M masks (B, L_m), None each, or None.

    Of a sparse MLP, its one input (..., D).
    """

    inputs: list[Tensor]
    masks: list[Tensor | None] | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Largest absolute error per group of outputs against the original in float64; how many times
    faster inference ran, or None where the original does not run."""

    errors: Mapping[str, float]
    speed_up: float | None


class _GivenNoise(TorchFunctionMode):
    """Within it torch.randn_like returns the given tensors, in order."""

    def __init__(self, noise: Sequence[Tensor]) -> None:
        super().__init__()
        self.left = list(noise)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What is not shaped as a sequence (B, L, D) is a gate's own noise, which is 0 in eval mode.
        if func is not torch.randn_like or args[0].dim() != 3:
            return func(*args, **(kwargs or {}))
        if not self.left or self.left[0].shape != args[0].shape:
            raise Disagreement("draws other noise than one replacement per expert and modality")
        return self.left.pop(0)


def compare(
    layer: nn.Module,
    spec: LayerSpec,
    adopt: Callable[[nn.Module], nn.Module],
    case: Case | None = None,
) -> Comparison:
    """Compare a layer with its fast replacement, in eval mode.

    Every view, the weights, the losses and inference are compared, each with the budget that
    `swap_outputs` states. Not compared are gate losses, of which the original keeps its last
    modality's, and which rows of a sparse MLP are dropped, which the original does not do the same
    way twice: no capacity is reached here. Where the original does not run in its own dtype (the published layer
    adds float32 positions, which its bfloat16 and float16 weights refuse), the reference layer's
    error takes the place of its own.

    Args:
        layer: the original; not run and not changed.
        spec: its description.
        adopt: makes the fast layer on the parameters of a layer.
        case: a call to compare on, its first samples only; random inputs, with and without masks,
            when None.

    Raises:
        Disagreement: with the reason.
        UnsupportedMLP: sparse MLPs of FastMoE's own code, where they must not be run.
    """
    check_can_run(layer)
    parameter = next(layer.parameters())
    device, dtype = parameter.device, parameter.dtype
    cases = random_cases(spec) if case is None else [_few_samples(case, spec)]
    original, exact = bare_copy(layer).eval(), bare_copy(layer).double().eval()
    peer: nn.Module = original
    fast = adopt(layer).eval()
    for module in (original, exact, fast):
        lift_capacity(module)
    errors: dict[str, float] = {}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for one in cases:
            at = _moved(one, device, dtype)
            noise = _noise(at, spec.num_experts)
            precise = _original(exact, _moved(at, device, torch.float64), noise, spec)
            try:
                own = _original(peer, at, noise, spec)
            except Exception:
                if dtype not in (torch.bfloat16, torch.float16):
                    raise
                peer = _reference_copy(layer, spec)
                own = _original(peer, at, noise, spec)
            found = _fast(fast, at, noise, spec)
            for group in precise.groups:
                error = within_budget(group, found, own, precise, dtype)
                errors[group] = max(errors.get(group, 0.0), error)
            check_own_losses(precise)
            check_fast_losses(found, dtype)
            error = largest(found.losses, precise.losses)
            errors["losses"] = max(errors.get("losses", 0.0), error)
        first = _moved(cases[0], device, dtype)
        speed_up = _speed_up(original, fast, first) if peer is original else None
    return Comparison(errors, speed_up)


def bare_copy(layer: nn.Module) -> nn.Module:
    """The layer on deep copies of its submodules, with no hook of the layer copied.

    Tensors that a forward left behind (attention maps) are shared: they may be large, and deepcopy
    refuses those that have a gradient history.
    """
    left_behind = {
        id(value): value.detach()
        for part in layer.modules()
        for held in vars(part).values()
        for value in (held if isinstance(held, list) else [held])
        if isinstance(value, Tensor)
    }
    clone = copy.copy(layer)
    for name, empty in vars(nn.Module()).items():
        if isinstance(empty, dict):
            clone.__dict__[name] = type(empty)()
    for name, child in layer.named_children():
        clone.add_module(name, copy.deepcopy(child, left_behind))
    return clone


def random_cases(spec: LayerSpec) -> list[Case]:
    """Two samples of N(0, 1) tokens: ragged and partly padded ones, then without masks."""
    generator = torch.Generator().manual_seed(0)
    lengths = [
        spec.num_patches or RANDOM_LENGTHS[m % len(RANDOM_LENGTHS)]
        for m in range(spec.num_modalities)
    ]
    inputs = [torch.randn(2, n, spec.hidden_dim, generator=generator) for n in lengths]
    if spec.compat == "i2moe":
        return [Case(inputs, None)]
    masks = [torch.ones(2, n, dtype=torch.bool) for n in lengths]
    for m, mask in enumerate(masks):
        mask[1, (mask.shape[1] + 1) // 2 :] = False
        if m == spec.num_modalities - 1:
            mask[1] = False
    return [Case(inputs, list(masks)), Case(inputs, None)]


def capture(
    model: nn.Module, layers: Sequence[nn.Module], args: tuple, kwargs: dict[str, Any]
) -> dict[int, Case]:
    """Run the model in eval mode and keep the first call of each layer, by id(layer).

    Calls of forward and of inference are seen. Modes are restored and no gradient is recorded. The
    model's own hooks fire, and an error of the model is the caller's.
    """
    seen: dict[int, Case] = {}
    modes = [(part, part.training) for part in model.modules()]
    undo: list[Callable[[], object]] = []
    for layer in layers:
        undo += _watch(layer, seen)
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for part, mode in modes:
            part.training = mode
        for step in undo:
            step()
    return seen


def _watch(layer: nn.Module, seen: dict[int, Case]) -> Iterator[Callable[[], object]]:
    """Let a copy answer the layer's calls and record them; yields what undoes it."""
    clone = bare_copy(layer).eval()

    def recording(answer: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(("inputs", "masks"), args, strict=False)) | kwargs
            if id(layer) not in seen:
                # "inp" is what a sparse MLP calls its input.
                inputs = given.get("inputs", given.get("inp"))
                seen[id(layer)] = Case(_tensors(inputs), _masks(given.get("masks")))
            return answer(*args, **kwargs)

        return recorded

    for method in ("forward", "inference"):
        if callable(answer := getattr(clone, method, None)):
            layer.__dict__[method] = recording(answer)
            yield partial(layer.__dict__.pop, method)


def _tensors(values: Any) -> list[Tensor]:
    """Copies of tensors or of one, none of anything else: the comparison will then say so."""
    if isinstance(values, Tensor):
        values = [values]
    if not isinstance(values, list | tuple) or not all(isinstance(x, Tensor) for x in values):
        return []
    return [x.detach().clone() for x in values]


def _masks(masks: Any) -> list[Tensor | None] | None:
    if masks is None:
        return None
    if not isinstance(masks, list | tuple):
        return []
    return [m.detach().clone() if isinstance(m, Tensor) else None for m in masks]


def _few_samples(case: Case, spec: LayerSpec) -> Case:
    """The first samples with any valid token: of the others the original makes NaN."""
    shapes = [tuple(x.shape) for x in case.inputs]
    if len(shapes) != spec.num_modalities or any(len(shape) != 3 for shape in shapes):
        raise Disagreement(
            f"was called with inputs of shapes {shapes}, expected {spec.num_modalities} sequences "
            f"(B, L, {spec.hidden_dim})"
        )
    given = [None] * len(shapes) if case.masks is None else case.masks
    if len(given) != len(shapes):
        raise Disagreement(f"was called with {len(given)} masks for {len(shapes)} modalities")
    valid = torch.zeros(shapes[0][0], dtype=torch.bool)
    for x, mask in zip(case.inputs, given, strict=True):
        present = torch.ones(x.shape[:2]) if mask is None else mask.cpu() != 0
        valid |= present.bool().any(dim=1)
    keep = valid.nonzero().flatten()[:MAX_SAMPLES]
    if not len(keep):
        raise Disagreement("the captured call has no sample with a valid token to compare on")
    masks = case.masks
    return Case(
        [x[keep.to(x.device)] for x in case.inputs],
        None if masks is None else [None if m is None else m[keep.to(m.device)] for m in masks],
    )


def _moved(case: Case, device: torch.device, dtype: torch.dtype) -> Case:
    masks = case.masks
    return Case(
        [x.to(device, dtype) for x in case.inputs],
        None if masks is None else [None if m is None else m.to(device) for m in masks],
    )


def _noise(case: Case, num_experts: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(x.shape, generator=generator).to(x) for x in case.inputs]
        for _ in range(num_experts)
    ]


def _reference_copy(layer: nn.Module, spec: LayerSpec) -> nn.Module:
    reference = build_like(spec)
    reference.load_state_dict(bare_copy(layer).state_dict())
    lift_capacity(reference)
    return reference.to(next(layer.parameters())).eval()


def _call(function: Callable[..., Any], case: Case) -> Any:
    """Call with masks where the signature has them: the older variant's layer has none."""
    if "masks" in inspect.signature(function).parameters:
        return function(list(case.inputs), case.masks)
    if case.masks is not None:
        raise Disagreement("was called with masks, which it does not take")
    return function(list(case.inputs))


def _original(layer: Any, case: Case, noise: list[list[Tensor]], spec: LayerSpec) -> Outputs:
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


def _fast(layer: Any, case: Case, noise: list[list[Tensor]], spec: LayerSpec) -> Outputs:
    try:
        result = layer(list(case.inputs), case.masks, replacements=noise)
        inferred = layer.inference(list(case.inputs), case.masks)
    except Exception as error:
        raise Disagreement(f"the fast layer fails: {first_line(error)}") from error
    return collect(result, inferred, spec)


def _speed_up(original: Any, fast: Any, case: Case) -> float | None:
    if not hasattr(original, "inference"):
        return None
    calls = (partial(_call, layer.inference, case) for layer in (original, fast))
    return times_faster(*calls, on=case.inputs[0].device)


def times_faster(
    original: Callable[[], Any], fast: Callable[[], Any], *, on: torch.device
) -> float:
    """How many times faster one call is than the other, by medians of a few interleaved calls of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(TIMED_CALLS + 1):
        for call, record in zip((original, fast), seconds, strict=True):
            start = time.perf_counter()
            call()
            if on.type == "cuda":
                torch.cuda.synchronize(on)
            if turn:
                record.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
