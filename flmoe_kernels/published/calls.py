"""Calls for the comparison of two layers: captured from a model, or random."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.layers.interaction_moe.architecture import FusionSpec, LayerSpec
from flmoe_kernels.layers.modalities import present_modalities

from .agreement import Disagreement

MAX_SAMPLES = 4
RANDOM_LENGTHS = (17, 12, 7, 13, 5)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an interaction layer: M sequences (B, L_m, D), and None or M masks (B, L_m) or None.

    For a sparse MLP: a single input (..., D).
    """

    inputs: list[Tensor]
    masks: list[Tensor | None] | None

    def map(self, inputs: Callable[[Tensor], Tensor], masks: Callable[[Tensor], Tensor]) -> Case:
        """Apply functions to every input and every mask."""
        return Case(
            [inputs(x) for x in self.inputs],
            None if self.masks is None else [None if m is None else masks(m) for m in self.masks],
        )

    def moved(self, device: torch.device, dtype: torch.dtype) -> Case:
        return self.map(lambda x: x.to(device, dtype), lambda m: m.to(device))


def random_cases(spec: LayerSpec | FusionSpec) -> list[Case]:
    """Make calls with two samples of N(0, 1) tokens: with ragged, partly padded sequences, and without masks."""
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
        if m == spec.num_modalities - 1 > 0:
            mask[1] = False
    return [Case(inputs, list(masks)), Case(inputs, None)]


def few_samples(case: Case, spec: LayerSpec | FusionSpec) -> Case:
    """Select the first samples with a valid token; for samples without, the original returns NaN."""
    shapes = [tuple(x.shape) for x in case.inputs]
    if len(shapes) != spec.num_modalities or any(len(shape) != 3 for shape in shapes):
        raise Disagreement(
            f"was called with inputs of shapes {shapes}, expected {spec.num_modalities} sequences "
            f"(B, L, {spec.hidden_dim})"
        )
    if case.masks is not None:
        # Missing masks as the published code completes the list.
        missing = [x.new_ones(x.shape[:2]) for x in case.inputs[len(case.masks) :]]
        case = dataclasses.replace(case, masks=[*case.masks, *missing])
    if len(case.masks or shapes) != len(shapes):
        raise Disagreement(
            f"was called with {len(case.masks or ())} masks for {len(shapes)} modalities"
        )
    keep = present(case).any(dim=1).nonzero().flatten()[:MAX_SAMPLES]
    if not len(keep):
        raise Disagreement("the captured call has no sample with a valid token, cannot compare")
    return case.map(lambda x: x[keep.to(x.device)], lambda m: m[keep.to(m.device)])


def present(case: Case) -> Tensor:
    """Whether each sample has a valid token of each modality, (B, M) bool on the CPU."""
    there = present_modalities(case.inputs, case.masks)
    if there is None:
        return torch.ones(case.inputs[0].shape[0], len(case.inputs), dtype=torch.bool)
    return there.cpu()


def capture(
    model: nn.Module, layers: Sequence[nn.Module], args: tuple, kwargs: dict[str, Any]
) -> dict[int, Case]:
    """Run the model in eval mode and return the first call of each layer's forward or inference, by id(layer)."""
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


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Restore the states of Python's and numpy's generators, from which a model may draw."""
    numpy = sys.modules.get("numpy")
    own, other = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(own)
        if numpy:
            numpy.random.set_state(other)


def _watch(layer: nn.Module, seen: dict[int, Case]) -> Iterator[Callable[[], object]]:
    """Record the layer's calls and let a copy compute them; yields functions that undo this."""
    clone = bare_copy(layer).eval()

    def recording(answer: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(("inputs", "masks"), args, strict=False)) | kwargs
            if id(layer) not in seen:
                # A sparse MLP names its input "inp".
                inputs = given.get("inputs", given.get("inp"))
                seen[id(layer)] = Case(_tensors(inputs), _masks(given.get("masks")))
            return answer(*args, **kwargs)

        return recorded

    for method in ("forward", "inference"):
        if callable(answer := getattr(clone, method, None)):
            layer.__dict__[method] = recording(answer)
            yield partial(layer.__dict__.pop, method)


def _tensors(values: Any) -> list[Tensor]:
    """Copy a tensor or a list of tensors; anything else gives [], which the comparison then reports."""
    if isinstance(values, Tensor):
        values = [values]
    if not isinstance(values, list | tuple) or not all(isinstance(x, Tensor) for x in values):
        return []
    return [x.detach().clone() for x in values]


def _masks(masks: Any) -> list[Tensor | None] | None:
    if masks is None or isinstance(masks, bool):  # return_latent of the older fusion model
        return None
    if not isinstance(masks, list | tuple):
        return []
    return [m.detach().clone() if isinstance(m, Tensor) else None for m in masks]


def bare_copy(layer: nn.Module) -> nn.Module:
    """Copy the layer with deep copies of its parameters and submodules, without the layer's hooks.

    Tensors that a forward stored in attributes (attention maps) are shared: they may be large, and deepcopy
    fails if they have a gradient history.
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
    clone._parameters.update(copy.deepcopy(layer._parameters, left_behind))
    for name, child in layer.named_children():
        clone.add_module(name, copy.deepcopy(child, left_behind))
    return clone
