"""Layers trained on the demo's tasks, for the experiments on explanations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits.data import TASKS, encode, load
from examples.digits.pipeline import draw_test_pairs, draw_train_pairs
from examples.digits.settings import Settings
from examples.digits.token_pairs import train_layer
from examples.digits.train import PairClassifier, accuracy, fit
from flmoe_kernels import InteractionMoE

INTERACTION, TOKEN_PAIRS = LAYERS = ("InteractionMoE", "PairInteractionMoE")
SYNERGY, REDUNDANT = "synergy", "redundant"


@dataclass(frozen=True)
class Learned:
    """A trained layer and held-out samples of its task.

    inputs: 2 x (B, 16, D); masks: 2 x (B, 16); labels: (B,). accuracy: on all held-out samples.
    """

    layer: nn.Module
    inputs: list[Tensor]
    masks: list[Tensor]
    labels: Tensor
    accuracy: float


def learn(task_name: str, layer_name: str, seed: int, samples: int) -> Learned:
    """Train one layer on one task with the demo's settings; returns it with the first held-out samples."""
    settings = Settings(seed=seed)
    task = next(task for task in TASKS if task.name == task_name)
    digits = load(seed)
    encoded = encode(digits, settings.width, seed, settings.encoder_steps)
    pairs, held_out = (draw(task, digits, settings) for draw in (draw_train_pairs, draw_test_pairs))
    layer: Any
    if layer_name == INTERACTION:
        torch.manual_seed(seed)
        model: Any = PairClassifier(task.num_classes, settings)
        model.layer = InteractionMoE.adopt(model.layer)
        layer = fit(model, pairs, encoded, settings).layer
    else:
        layer = train_layer(task, pairs, encoded, settings)
    inputs, masks = held_out.batch(encoded, slice(None))
    logits = (
        layer.inference(inputs, masks)[2]
        if layer_name == INTERACTION
        else layer(inputs, masks).logits
    )
    return Learned(
        layer,
        [x[:samples] for x in inputs],
        [x[:samples] for x in masks],
        held_out.labels[:samples],
        accuracy(logits, held_out.labels),
    )
