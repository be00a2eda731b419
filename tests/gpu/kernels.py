"""Calls of the GPU tests on CPU tensors, from which bench/gpu.sh compiles their kernels beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch

from flmoe_kernels.core.backend import TRITON, use_backend
from tests.gpu import test_interaction_moe as layers
from tests.gpu import test_ops as operators
from tests.support.inputs import draw, draw_masks, draw_replacements

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


def on_cpu(module: ModuleType, call: Callable[[], object]) -> None:
    before, module.DEVICE = module.DEVICE, CPU  # type: ignore[attr-defined]
    try:
        with use_backend(TRITON):
            call()
    finally:
        module.DEVICE = before  # type: ignore[attr-defined]


def compare_layer(case: layers.LayerCase, dtype: torch.dtype) -> None:
    x = case.inputs(dtype)
    masks = draw_masks(case.masks, case.batch, case.lengths)
    noise = draw_replacements(x, case.experts)
    layers.results(layers.gpu_layer(case, dtype), x, masks, noise)


def train_layer(case: layers.LayerCase, masks: str) -> None:
    training = layers.Training(case, masks)
    training.loss().backward()
    training.layer.inference(training.x, training.masks)


def train_pairs() -> None:
    masks = draw_masks("partial", layers.FL.batch, layers.FL.lengths)
    outputs = layers.graphable("pairs", 0.5)(layers.FL.inputs(), masks)
    torch.stack([x.sum() for x in outputs]).sum().backward()


def step_of_router() -> None:
    case = operators.ROUTED[1]
    x, _, *weights = (t.requires_grad_() for t in case.inputs(torch.bfloat16))
    router = draw(case.width, case.experts, dtype=torch.bfloat16).requires_grad_()
    operators.step(x, router, weights)


def calls() -> Iterator[Callable[[], object]]:
    """Calls that launch most of the kernels. The tests compile the others."""
    for run, make, _name in operators.CASES:
        for dtype in DTYPES:
            yield partial(on_cpu, operators, partial(run, make(dtype), TRITON))
    yield partial(on_cpu, operators, step_of_router)
    for case in layers.CASES:
        for dtype in DTYPES:
            yield partial(on_cpu, layers, partial(compare_layer, case, dtype))
    trained = [*layers.WAITS, (dataclasses.replace(layers.FL, dropout=0.5), "partial")]
    for case, masks in trained:
        yield partial(on_cpu, layers, partial(train_layer, case, masks))
    yield partial(on_cpu, layers, train_pairs)
