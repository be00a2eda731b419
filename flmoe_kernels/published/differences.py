"""Behaviours of a layer and its replacement that differ by design, measured on the inputs of the comparison.

docs/differences.md and docs/fastmoe.md explain them. The comparison excludes them, so a report without them would
promise more than holds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.layers.interaction_moe.architecture import LayerSpec
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.routed_mlp.structure import NOISY_GATES, RoutedSpec

from .agreement import Outputs, largest
from .calls import Case, bare_copy, present
from .convert import adopt
from .recognise import Spec
from .runs import lift_capacity, run

ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Difference:
    """A behaviour that differs; size is the measured difference, in the unit that the text states."""

    text: str
    size: float


def measure(
    layer: nn.Module, spec: Spec, case: Case, captured: Case | None = None
) -> tuple[Difference, ...]:
    """Measure the differences of a layer with sparse MLPs, and count samples with missing modalities.

    captured: the whole call of the model, if there is one; `case`, the call to compare, may have fewer samples.
    """
    found = []
    if captured is not None and not isinstance(spec, RoutedSpec):
        there = present(captured)
        empty, whole = ~there.any(dim=1), there.all(dim=1)
        if padded := int(empty.sum()):
            text = f"samples without a valid token ({padded}): NaN in the original, latent 0 after swap"
            found.append(Difference(text, padded))
        published = isinstance(spec, LayerSpec) and not isinstance(layer, ReferenceInteractionMoE)
        if published and (incomplete := int((~empty & ~whole).sum())):
            text = (
                f"samples without a modality ({incomplete}): the views that replace it enter the losses only in "
                "the original"
            )
            found.append(Difference(text, incomplete))
    gates = [part for part in layer.modules() if "tot_expert" in vars(part)]
    if not gates:
        return tuple(found)
    with torch.no_grad():
        case = case.moved(next(layer.parameters()).device, torch.float64)
        if not isinstance(spec, LayerSpec) or spec.fusion_sparse:
            found += _gate_losses(layer, spec, case)
        if any(getattr(gate, "random_routing", False) for gate in gates):
            expected, actual = _outputs(layer, spec, case, "random_routing")
            error = _largest(expected, actual)
            text = (
                "random routing in evaluation only in the original: outputs differ by up to "
                f"{error:.1e}"
            )
            found.append(Difference(text, error))
        if any("capacity" in vars(gate) for gate in gates):
            found += [_capacity(layer, spec, case, training) for training in (False, True)]
    padding = sum(int((mask == 0).sum()) for mask in case.masks or () if mask is not None)
    if padding:
        text = (
            f"{padding} padded tokens use capacity and enter the gate losses only in the original"
        )
        found.append(Difference(text, padding))
    return tuple(found)


def _mean(losses: list[float]) -> float:
    return sum(losses) / max(len(losses), 1)  # NaN for losses that are inf and -inf


def _gate_losses(layer: nn.Module, spec: Spec, case: Case) -> list[Difference]:
    expected, actual = (
        _mean([float(loss) for loss in x.gate_losses if loss is not None])
        for x in _outputs(layer, spec, case, "capacity")
    )
    size = abs(actual - expected)
    text = f"gate losses in evaluation: {expected:.4g} in the original, {actual:.4g} in the swapped layer"
    if isinstance(spec, RoutedSpec):
        return [Difference(text, size)] if size > ROUNDING else []
    published = "all modalities"
    if spec.sparse is not None and spec.sparse.gate not in NOISY_GATES:
        published = "only the last modality"
    text += f"; original: {published}, no gradients; swapped: all modalities, with gradients"
    return [Difference(text, size)]


def _capacity(layer: nn.Module, spec: Spec, case: Case, training: bool) -> Difference:
    """Dropped choices and the difference of the outputs, with the rates for training or evaluation."""
    dropped: list[int] = [0, 0]
    expected, actual = _outputs(layer, spec, case, "capacity", training, dropped)
    error = _largest(expected, actual)
    mode = "training" if training else "evaluation"
    text = (
        f"capacity in {mode}: {dropped[0]} choices of valid tokens dropped before swap, {dropped[1]} after; "
        f"outputs differ by up to {error:.1e}"
    )
    return Difference(text, error)


def _outputs(
    layer: nn.Module,
    spec: Spec,
    case: Case,
    keep: str,
    training: bool = False,
    dropped: list[int] | None = None,
) -> list[Outputs]:
    """Outputs of the layer and its replacement in float64, with one setting of their gates as it is.

    training: mode of the gates alone. dropped: receives the numbers of dropped choices of valid tokens.
    """
    original: Any = bare_copy(layer).double().eval()
    fast: Any = adopt(original, spec)
    fast.backend = REFERENCE
    results = []
    for number, module in enumerate((original, fast)):
        lift_capacity(module, keep)
        for gate in (part for part in module.modules() if "tot_expert" in vars(part)):
            gate.training = training
            if dropped is not None:
                gate.register_forward_hook(_counter(case, dropped, number))
        outputs = run(module, case, spec)
        if isinstance(spec, RoutedSpec):
            outputs = dataclasses.replace(outputs, gate_losses=[module.gate.get_loss()])
        results.append(outputs)
    return results


def _counter(case: Case, dropped: list[int], number: int) -> Callable[..., None]:
    """A hook that counts the dropped choices of valid tokens; a gate is called once per modality in turn."""
    masks = itertools.cycle(case.masks or [None])

    def count(gate: nn.Module, args: tuple, out: Any) -> None:
        lost = out[0].view(len(args[0]), -1) < 0
        mask = next(masks)
        dropped[number] += int((lost if mask is None else lost[mask.flatten() != 0]).sum())

    return count


def _largest(expected: Outputs, actual: Outputs) -> float:
    return max(largest(x, actual.groups[name]) for name, x in expected.groups.items())
