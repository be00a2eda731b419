"""Comparison of the published and the fast layer: values, gradients, time, memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import flmoe_kernels
from flmoe_kernels.core.error_budget import FACTOR, ROUNDING
from flmoe_kernels.profile.memory import peak_of

from .data import EXPERTS, NUM_CLASSES, NUM_TOKENS, Batch
from .settings import Settings
from .train import PairClassifier, make_optimizer, total_loss, training_step

LAYERS = ("reference", "fast")
GROUPS = ("logits", "weights", "losses", "gradients")


def compare(
    reference: nn.Module, fast: nn.Module, batch: Batch, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Differences between the models on one batch, with the same replacement noise and no dropout.

    Returns:
        For each group of results: the largest absolute difference, the largest value, the errors of both layers
        against the reference in float64, and whether the fast layer meets the error budget of the package's tests.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    noise = [[torch.randn(x.shape, generator=generator) for x in batch[0]] for _ in EXPERTS]
    exact = _values(copy.deepcopy(reference).double(), batch, noise, settings)
    ours = _values(reference, batch, noise, settings)
    theirs = _values(fast, batch, noise, settings)
    differences = {}
    for group in GROUPS:
        scale = max(value.abs().max().item() for value in ours[group].values())
        reference_error = _distance(exact[group], ours[group])
        fast_error = _distance(exact[group], theirs[group])
        rounding = ROUNDING[torch.float32] * torch.finfo(torch.float32).eps * scale
        differences[group] = {
            "largest": _distance(ours[group], theirs[group]),
            "scale": scale,
            "reference_error": reference_error,
            "fast_error": fast_error,
            "rounding_only": fast_error <= FACTOR * reference_error + rounding,
        }
    return differences


def _values(
    model: nn.Module, batch: Batch, noise: list[list[Tensor]], settings: Settings
) -> dict[str, dict[str, Tensor]]:
    """All results of a training step without dropout, by group and name."""
    dtype = next(model.parameters()).dtype
    inputs, masks, labels = batch
    model.eval()
    model.zero_grad(set_to_none=True)
    outputs = model(
        [x.to(dtype) for x in inputs],
        masks,
        replacements=[[n.to(dtype) for n in row] for row in noise],
    )
    total_loss(outputs, labels, settings.interaction_weight).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    _, weights, logits, losses, *_ = outputs
    return {
        "logits": {"logits": logits.detach()},
        "weights": {"weights": weights.detach()},
        "losses": {f"loss of {EXPERTS[e]}": loss.detach() for e, loss in enumerate(losses)},
        "gradients": gradients,
    }


def _distance(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """Largest absolute difference over tensors with the same names; NaN if any value is NaN."""
    if expected.keys() != actual.keys():
        raise RuntimeError(f"only in one of the layers: {sorted(expected.keys() ^ actual.keys())}")
    gaps = [(expected[name].double() - actual[name].double()).abs().max() for name in expected]
    return torch.stack(gaps).max().item()


def time_both(
    reference: PairClassifier, fast: PairClassifier, batch: Batch, settings: Settings
) -> dict[str, dict[str, float]]:
    """Median seconds of a training step (dropout and fresh noise) and of inference, on copies of the models."""
    models = [copy.deepcopy(model).train() for model in (reference, fast)]
    steps = [_step(model, batch, settings) for model in models]
    training = interleaved(steps, settings.timed_steps)
    with torch.no_grad():
        calls = [lambda m=m: m.eval().inference(*batch[:2]) for m in models]
        inference = interleaved(calls, settings.timed_inferences)
    return {"training step": training, "inference": inference}


def _step(model: PairClassifier, batch: Batch, settings: Settings) -> Callable[[], Tensor]:
    optimizer = make_optimizer(model, settings)
    return lambda: training_step(model, optimizer, batch, settings.interaction_weight)


def interleaved(calls: Sequence[Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of both layers' calls. Calls alternate, so that other load affects both layers alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, spent in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if repeat > 0:  # the first call is a warm-up
                spent.append(time.perf_counter() - start)
    reference, fast = (statistics.median(spent) for spent in seconds)
    return {"reference": reference, "fast": fast, "speed_up": reference / fast}


def peak_memory(settings: Settings) -> dict[str, int | None]:
    """Bytes by which a new process grows during training steps, for each layer; None if this is unknown."""
    return {layer: peak_of(_fresh_step, layer, settings, device="cpu") for layer in LAYERS}


def _fresh_step(layer: str, settings: Settings) -> Callable[[], Tensor]:
    """A training step of a new model, after a small one that loads libraries and allocates gradients."""
    torch.manual_seed(settings.seed)
    model = PairClassifier(NUM_CLASSES, settings)
    if layer == "fast":
        # The check is off, because it would run the reference layer in this process too.
        flmoe_kernels.swap(model, check=False)
    optimizer = make_optimizer(model.train(), settings)
    training_step(model, optimizer, _random_batch(2, settings), settings.interaction_weight)
    batch = _random_batch(settings.batch_size, settings)
    return lambda: training_step(model, optimizer, batch, settings.interaction_weight)


def _random_batch(samples: int, settings: Settings) -> Batch:
    inputs = [torch.randn(samples, NUM_TOKENS, settings.width) for _ in range(2)]
    masks = [torch.ones(samples, NUM_TOKENS, dtype=torch.bool) for _ in range(2)]
    return inputs, masks, torch.randint(NUM_CLASSES, (samples,))
