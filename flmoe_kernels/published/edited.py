"""Comparison of layers whose source is not published code.

Edits may act in training only, on gradients, with masks, or on long inputs. So both layers run on copies in both
modes with equal dropout masks and replacements, and outputs and gradients are compared in float64. The replacement
is the reference layer here; `compare` compares it with the kernels.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.core.dtypes import without_autocast
from flmoe_kernels.layers.interaction_moe.architecture import LayerSpec
from flmoe_kernels.layers.routed_mlp.structure import RoutedSpec

from .agreement import Disagreement, Outputs, first_line, largest
from .calls import Case, bare_copy, few_samples
from .convert import adopt
from .recognise import Spec, check_can_run
from .runs import GivenNoise, call, lift_capacity, run

# Relative to the largest value of a group, and to the norm of a parameter's gradient.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LONG_TOLERANCE = 1e-3
SHORT_LENGTHS = (7, 5, 6, 4, 3)
# Longer than the sequences of usual encoders: 512 tokens of text, 196 or 1024 patches.
LONG_LENGTH = 1025
SAMPLES = 5


def compare_edited(
    layer: nn.Module, spec: Spec, paths: Iterable[str], given: Case | None = None
) -> None:
    """Compare a layer, whose source is not known, with the mathematics of its fast replacement.

    Args:
        layer: the original; only copies are run.
        spec: its description.
        paths: the parts with unknown methods.
        given: a call of the layer in the model, which is compared, too.

    Raises:
        Disagreement: the layers differ; the message is the reason.
        UnsupportedLayer: the layer has FastMoE's own code and is not on a CUDA GPU.
    """
    check_can_run(layer)
    with without_autocast(next(layer.parameters()).device):
        pair = _Pair(layer, spec)
        # On long inputs, compare the perturbed views only if code outside the fusion models is unknown.
        views = any(".fusion_model" not in path for path in paths)
        for training in (True, False):
            for case in _cases(spec, given):
                pair.compare(case, training)
            with torch.no_grad():
                _compare_long(layer, spec, pair.dropouts, training, views)


class _Pair:
    """Float64 copies of a layer and of its replacement on the reference backend, with the same parameters."""

    def __init__(self, layer: nn.Module, spec: Spec) -> None:
        self.spec = spec
        self.original: Any = bare_copy(layer).double()
        fast: Any = adopt(self.original, spec)
        fast.backend = REFERENCE
        self.fast = fast
        self.parameters: dict[str, Tensor] = dict(self.original.named_parameters())
        self.original.requires_grad_(True)
        self.device = next(iter(self.parameters.values())).device
        # Dropouts that the published code does not have are edits and keep their rates.
        parts = self.fast.named_modules()
        self.dropouts = [str(name) for name, part in parts if isinstance(part, nn.Dropout)]
        self.calls: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for module, calls in zip((self.original, self.fast), self.calls, strict=True):
            lift_capacity(module)
            _give_dropout(module, self.dropouts, calls)
        self.in_gate = _watch_gates(self.original)

    def compare(self, case: Case, training: bool) -> None:
        mode = _mode(training)
        inputs = [x.to(self.device, torch.float64).requires_grad_() for x in case.inputs]
        masks = case.moved(self.device, torch.float64).masks
        at = Case(inputs, masks)
        for module, calls in zip((self.original, self.fast), self.calls, strict=True):
            module.train(training)
            calls.clear()
        with without_draws(mode, self.device):
            expected = run(self.original, at, self.spec, self.in_gate)
        # The swapped layer is given its noise; only gates draw some.
        actual = run(self.fast, at, self.spec, in_gate=(self,))
        if self.calls[0] != self.calls[1]:
            name = min((self.calls[0] - self.calls[1]) + (self.calls[1] - self.calls[0]))
            counts = [calls[name] for calls in self.calls]
            raise Disagreement(f"in {mode} {name} runs {counts[0]} times, expected {counts[1]}")
        _check_groups(expected, actual, mode, TOLERANCE)
        leaves = {f"input {m}": x for m, x in enumerate(inputs)} | self.parameters
        _check_gradients(_gradients(expected, leaves), _gradients(actual, leaves), mode)


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _cases(spec: Spec, given: Case | None) -> Iterator[Case]:
    """Random calls, each with its own seed: without masks, and with a modality short or padded in turn."""
    seeds = iter(range(100))

    def draw(lengths: Sequence[int], width: int, batch: int = 2) -> list[Tensor]:
        generator = torch.Generator().manual_seed(next(seeds))
        return [torch.randn(batch, n, width, generator=generator) for n in lengths]

    if isinstance(spec, RoutedSpec):
        yield from (Case(draw((n,), spec.d_model), None) for n in (SHORT_LENGTHS[0], 1))
        return
    count = spec.num_modalities
    lengths = [spec.num_patches or SHORT_LENGTHS[m % len(SHORT_LENGTHS)] for m in range(count)]
    yield Case(draw(lengths, spec.hidden_dim, SAMPLES), None)
    if given is not None:
        yield few_samples(given, spec)
    if spec.compat == "i2moe":
        if lengths[0] <= 32:  # many tokens take long in float64
            yield Case(draw(lengths, spec.hidden_dim), None)
        return
    for m in range(count):
        short = [1 if n == m else length for n, length in enumerate(lengths)]
        yield Case(draw(short, spec.hidden_dim), None)
        masks: list[Tensor | None] = [torch.ones(2, length, dtype=torch.bool) for length in lengths]
        for row in (0, 1):
            masks[m][row, 2 * row + (count == 1) :] = False  # type: ignore[index]
        yield Case(draw(lengths, spec.hidden_dim), masks)


def _give_dropout(module: nn.Module, names: Sequence[str], calls: Counter[str]) -> None:
    """Replace dropouts in training by multiplications with values that depend on name and number of the call."""

    def scaled(key: str, part: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if not part.training:
            return None
        seed = zlib.crc32(f"{key} {calls[key]}".encode())
        calls[key] += 1
        generator = torch.Generator().manual_seed(seed)
        factors = 0.5 + torch.rand(out.numel(), generator=generator, dtype=out.dtype)
        return out * factors.view_as(out).to(out.device)

    watched: set[int] = set()
    for name in names:
        part = module.get_submodule(name)
        part.p = 0.0  # type: ignore[assignment]
        if id(part) not in watched:  # the published MLPs have one dropout for all of their layers
            watched.add(id(part))
            key = re.sub(r"network\.\d+$", "network", name)
            part.register_forward_hook(partial(scaled, key))


def _watch_gates(module: nn.Module) -> list[object]:
    """A list that is not empty while a gate runs."""
    running: list[object] = []

    def enter(gate: nn.Module, args: tuple) -> None:
        running.append(gate)

    def leave(gate: nn.Module, args: tuple, out: Any) -> None:
        running.pop()

    for part in module.modules():
        if "tot_expert" in vars(part):
            part.register_forward_pre_hook(enter)
            part.register_forward_hook(leave)
    return running


def _compare_long(
    layer: nn.Module, spec: Spec, dropouts: Sequence[str], training: bool, views: bool
) -> None:
    """Compare inference, and with `views` also forward, on a long sample; learned positions fix the length."""
    if not isinstance(spec, RoutedSpec) and spec.num_patches:
        return
    original: Any = bare_copy(layer).train(training)
    if next(layer.parameters()).dtype in (torch.bfloat16, torch.float16):
        original.float()
    for name in dropouts:
        original.get_submodule(name).p = 0.0
    lift_capacity(original)
    fast: Any = adopt(original, spec)
    lift_capacity(fast)
    for part in original.modules():
        if hasattr(part, "last_attn"):  # hundreds of megabytes
            part.register_forward_hook(_drop_map)
    parameter = next(original.parameters())
    case = _long_case(spec, training).moved(parameter.device, parameter.dtype)

    try:
        with without_draws(_mode(training), parameter.device):
            expected = _long_run(original, case, spec, views, _watch_gates(original))
    except Disagreement:
        raise
    except Exception as error:
        raise Disagreement(f"fails on {LONG_LENGTH} tokens: {first_line(error)}") from error
    what = f"{_mode(training)} on {LONG_LENGTH} tokens"
    actual = _long_run(fast, case, spec, views, in_gate=(fast,))
    _check_groups(expected, actual, what, LONG_TOLERANCE)


def _long_run(
    module: Any, case: Case, spec: Spec, views: bool, in_gate: Sequence[object]
) -> Outputs:
    if views or not isinstance(spec, LayerSpec) or not hasattr(module, "inference"):
        return run(module, case, spec, in_gate)
    with GivenNoise([], in_gate):
        logits, weights, mixed = call(module.inference, case)
    return Outputs({"logits": [mixed, *logits], "weights": [weights]}, [], [])


def _long_case(spec: Spec, masked: bool) -> Case:
    width = spec.d_model if isinstance(spec, RoutedSpec) else spec.hidden_dim
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for _ in range(1 if isinstance(spec, RoutedSpec) else spec.num_modalities):
        x = torch.randn(1, LONG_LENGTH, width, generator=generator)
        # So that the means change if the last tokens are lost.
        x[:, 3 * LONG_LENGTH // 4 :] += 3 * torch.randn(width, generator=generator)
        inputs.append(x)
    if isinstance(spec, RoutedSpec) or not masked:
        return Case(inputs, None)
    mask = torch.ones(1, LONG_LENGTH, dtype=torch.bool)
    mask[:, 9:99] = False
    masks: list[Tensor | None] = [mask for _ in inputs]
    return Case(inputs, masks)


def _drop_map(part: Any, args: tuple, out: Any) -> None:
    part.last_attn = None


def _check_groups(expected: Outputs, actual: Outputs, mode: str, tolerance: float) -> None:
    groups = {name: (tensors, actual.groups[name]) for name, tensors in expected.groups.items()}
    if expected.losses:
        groups["losses"] = (expected.losses, actual.losses)
    for name, (own, fast) in groups.items():
        if [x.shape for x in own] != [x.shape for x in fast]:
            raise Disagreement(f"in {mode} the shapes of the {name} differ")
        own, fast = ([x.detach() for x in tensors] for tensors in (own, fast))
        error, size = largest(own, fast), max(float(x.abs().max()) for x in fast)
        if not error <= tolerance * max(size, 1.0 if name == "losses" else 0.0):
            raise Disagreement(f"in {mode} the {name} differ by {error:.1e}")


def _gradients(outputs: Outputs, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a random linear combination of all outputs; zeros where there is none."""
    generator = torch.Generator().manual_seed(2)
    total = next(iter(leaves.values())).new_zeros(())
    for x in (*(x for tensors in outputs.groups.values() for x in tensors), *outputs.losses):
        total = total + (x * torch.randn(x.shape, generator=generator).to(x)).sum()
    if not total.requires_grad:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), found, strict=True)
    }


def _check_gradients(expected: dict[str, Tensor], actual: dict[str, Tensor], mode: str) -> None:
    floor = 1e-9 * max(float(x.norm()) for x in actual.values())
    for name, gradient in actual.items():
        error, size = float((gradient - expected[name]).norm()), float(gradient.norm())
        if not error <= GRADIENT_TOLERANCE * size + floor:
            raise Disagreement(
                f"in {mode} the gradients of {name} differ by {error:.1e} (norm {size:.1e})"
            )


def _states(device: torch.device) -> list[Any]:
    states: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).tolist())
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        states.append((name, keys.tolist(), *rest))
    return states


@contextlib.contextmanager
def without_draws(mode: str, device: torch.device) -> Iterator[None]:
    """Raise Disagreement if the code inside draws from a random generator of torch, Python or numpy."""
    before = _states(device)
    yield
    if _states(device) != before:
        raise Disagreement(f"in {mode} random numbers are drawn besides dropout and replacements")


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Restore the states of Python's and numpy's generators."""
    restore: list[Callable[[], object]] = [partial(random.setstate, random.getstate())]
    if numpy := sys.modules.get("numpy"):
        restore.append(partial(numpy.random.set_state, numpy.random.get_state()))
    try:
        yield
    finally:
        for step in restore:
            step()
