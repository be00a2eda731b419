"""Time and memory of the published and the fast layer."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import flmoe_kernels
from flmoe_kernels.profile.memory import peak_of

from .data import NUM_CLASSES, NUM_TOKENS, Batch
from .settings import Settings
from .train import PairClassifier, make_optimizer, training_step

LAYERS = ("reference", "fast")


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
