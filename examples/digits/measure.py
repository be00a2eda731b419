"""The reference and the fast layer side by side: values, gradients and time."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flmoe_kernels.core.error_budget import FACTOR, ROUNDING

from .data import EXPERTS
from .settings import Settings
from .train import PairClassifier, evaluating, make_optimizer, total_loss, training_step

GROUPS = ("logits", "weights", "losses", "gradients")

Batch = tuple[list[Tensor], list[Tensor], Tensor]
Values = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Difference:
    """One group of results of both layers.

    Attributes:
        largest: largest absolute difference between the two.
        where: the tensor that has it.
        scale: largest absolute value of the reference in this group.
        reference_error: the reference's own largest distance from itself run in float64.
        fast_error: the fast layer's.
    """

    largest: float
    where: str
    scale: float
    reference_error: float
    fast_error: float

    @property
    def rounding_only(self) -> bool:
        """Whether the fast layer is as close to exact as the package's tests ask of a backend."""
        rounding = ROUNDING[torch.float32] * torch.finfo(torch.float32).eps * self.scale
        return self.fast_error <= FACTOR * self.reference_error + rounding


def compare(
    reference: PairClassifier, fast: PairClassifier, batch: Batch, settings: Settings
) -> dict[str, Difference]:
    """Both models on one batch with the same replacement noise and no dropout.

    Args:
        reference: a model with the reference layer.
        fast: the same with the fast layer; parameters of the same names.
        batch: inputs, masks, labels.
        settings: the seed of the noise and the weight of the interaction losses.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    noise = [[torch.randn(x.shape, generator=generator) for x in batch[0]] for _ in EXPERTS]
    exact = _values(copy.deepcopy(reference).double(), batch, noise, settings)
    ours = _values(reference, batch, noise, settings)
    theirs = _values(fast, batch, noise, settings)
    found = {}
    for group in GROUPS:
        largest, where = _distance(ours[group], theirs[group])
        found[group] = Difference(
            largest=largest,
            where=where,
            scale=max(value.abs().max().item() for value in ours[group].values()),
            reference_error=_distance(exact[group], ours[group])[0],
            fast_error=_distance(exact[group], theirs[group])[0],
        )
    return found


def _values(
    model: nn.Module, batch: Batch, noise: list[list[Tensor]], settings: Settings
) -> Values:
    """Every result of one training step without dropout, by group and name."""
    dtype = next(model.parameters()).dtype
    inputs = [x.to(dtype) for x in batch[0]]
    replacements = [[n.to(dtype) for n in row] for row in noise]
    # Eval mode is what switches off dropout in both layers; gradients flow all the same.
    model.eval()
    model.zero_grad(set_to_none=True)
    outputs = model(inputs, batch[1], replacements=replacements)
    total_loss(outputs, batch[2], settings.interaction_weight).backward()
    gradients = {name: _gradient(name, p) for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    _, weights, logits, losses, *_ = outputs
    return {
        "logits": {"logits": logits.detach()},
        "weights": {"weights": weights.detach()},
        "losses": {f"loss of {EXPERTS[e]}": loss.detach() for e, loss in enumerate(losses)},
        "gradients": gradients,
    }


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"{name} has no gradient")
    return parameter.grad.detach().clone()


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """Largest absolute difference and the name of the tensor that has it."""
    if one.keys() != other.keys():
        raise RuntimeError(f"only in one of the two: {sorted(one.keys() ^ other.keys())}")
    worst, where = -1.0, ""
    for name, value in one.items():
        gap = (value.double() - other[name].double()).abs().max().item()
        if not math.isfinite(gap):
            raise RuntimeError(f"{name} is not finite")
        if gap > worst:
            worst, where = gap, name
    return worst, where


@dataclass(frozen=True)
class Times:
    """Median seconds of one call of both layers."""

    reference: float
    fast: float
    repeats: int

    @property
    def speed_up(self) -> float:
        return self.reference / self.fast


def time_training(
    reference: PairClassifier, fast: PairClassifier, batch: Batch, settings: Settings
) -> Times:
    """A training step with dropout and fresh noise, on copies of the models."""
    steps = []
    for model in (reference, fast):
        model = copy.deepcopy(model).train()
        optimizer = make_optimizer(model, settings)
        steps.append((model, optimizer))

    def step(which: int) -> Callable[[], object]:
        model, optimizer = steps[which]
        return lambda: training_step(model, optimizer, batch, settings.interaction_weight)

    return interleaved(step(0), step(1), settings.timed_steps)


def time_inference(
    reference: PairClassifier, fast: PairClassifier, batch: Batch, settings: Settings
) -> Times:
    """Inference of the full view on one batch."""
    inputs, masks, _ = batch
    with evaluating(reference), evaluating(fast):
        return interleaved(
            lambda: reference.inference(inputs, masks),
            lambda: fast.inference(inputs, masks),
            settings.timed_inferences,
        )


def interleaved(reference: Callable[[], object], fast: Callable[[], object], repeats: int) -> Times:
    """Medians of calls that alternate, so that other load on the machine meets both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (reference, fast):
        function()
    for _ in range(repeats):
        for function, spent in zip((reference, fast), times, strict=True):
            start = time.perf_counter()
            function()
            spent.append(time.perf_counter() - start)
    return Times(statistics.median(times[0]), statistics.median(times[1]), repeats)


def changed(one: Tensor, other: Tensor) -> int:
    """How many samples are classified differently by two sets of logits."""
    return int((one.argmax(dim=1) != other.argmax(dim=1)).sum())
