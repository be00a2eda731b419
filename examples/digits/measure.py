"""Time and memory of the published and the fast layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import flmoe_kernels
from flmoe_kernels.profile.memory import peak_of
from flmoe_kernels.profile.timing import clock_for, measure_blocks

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
    training = _medians(steps, settings.timed_seconds)
    with torch.no_grad():
        calls = [lambda m=m: m.eval().inference(*batch[:2]) for m in models]
        inference = _medians(calls, settings.timed_seconds)
    return {"training step": training, "inference": inference}


def _step(model: PairClassifier, batch: Batch, settings: Settings) -> Callable[[], Tensor]:
    optimizer = make_optimizer(model, settings)
    return lambda: training_step(model, optimizer, batch, settings.interaction_weight)


def _medians(calls: Sequence[Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of both layers' calls, which alternate."""
    blocks = measure_blocks(
        lambda: dict(zip(LAYERS, calls, strict=True)),
        clock_for("cpu"),
        rounds=1,
        precision=0.05,
        seconds=seconds,
    )
    found = blocks.pair("fast", "reference")
    medians = (found.peer.median, found.ours.median, found.ratio.median)
    return dict(zip((*LAYERS, "speed_up"), medians, strict=True))


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
