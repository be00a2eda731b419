"""All stages of the run: train, save, swap, compare, explain."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import flmoe_kernels
from flmoe_kernels.core.files import write_whole
from flmoe_kernels.profile.environment import environment
from flmoe_kernels.published.file import CONFIG_KEY, MODEL_KEY
from flmoe_kernels.published.report import SwapReport

from .data import EXPERTS, TASKS, Digits, Encoded, Pairs, Task, encode, load, make_pairs
from .settings import Settings
from .token_pairs import evaluate, train_layer
from .train import PairClassifier, accuracy, predict, train


def run(settings: Settings, out: Path, console: Console) -> dict[str, Any]:
    """Run all stages and write the checkpoints to `out`.

    Returns:
        All results as plain values, for demo.json, the tables and the figures. With the same seed, all results
        except times are the same in every run on one machine.
    """
    start = time.perf_counter()
    digits = load(settings.seed)
    console.print(
        f"{len(digits.labels)} handwritten digits: {len(digits.train)} for training, "
        f"{len(digits.test)} held out. Training two small encoders, which are then frozen."
    )
    threads = torch.get_num_threads()
    # One thread gives the same numbers for any number of cores; several tasks train in parallel instead.
    torch.set_num_threads(1)
    try:
        encoded = encode(digits, settings.width, settings.seed, settings.encoder_steps)
    finally:
        torch.set_num_threads(threads)
    console.print(f"Training two layers on each of {len(TASKS)} tasks, {threads} at a time.")
    workers, context = min(threads, 2 * len(TASKS)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        trained = [pool.submit(run_swap, t, digits, encoded, settings, out) for t in TASKS]
        trained += [pool.submit(run_pairs, t, digits, encoded, settings) for t in TASKS]
        results = [future.result() for future in trained]
    tasks, pairs = (
        dict(zip((task.name for task in TASKS), part, strict=True))
        for part in (results[: len(TASKS)], results[len(TASKS) :])
    )
    return {
        "settings": dataclasses.asdict(settings),
        "environment": environment(),
        "images": {"train": len(digits.train), "test": len(digits.test)},
        "encoder_test_accuracy": encoded.accuracy,
        "tasks": tasks,
        "token_pair_layer": pairs,
        "total_seconds": time.perf_counter() - start,
    }


def run_swap(
    task: Task, digits: Digits, encoded: Encoded, settings: Settings, out: Path
) -> dict[str, Any]:
    """Train the published layer on a task, save it, swap it, and compare predictions of both layers."""
    reference = train(task, draw_train_pairs(task, digits, settings), encoded, settings)
    save_checkpoint(reference, settings, checkpoint_of(task, out))
    test = draw_test_pairs(task, digits, settings)
    report = swapped(reference, test.batch(encoded, slice(0, settings.batch_size)))
    fast = report.model
    assert isinstance(fast, PairClassifier)
    before, after = predict(reference, test, encoded), predict(fast, test, encoded)
    changed = before.argmax(dim=1) != after.argmax(dim=1)
    return {
        "label": task.meaning,
        "chance": task.chance,
        "checkpoint": checkpoint_of(task, out).name,
        "accuracy_before": accuracy(before, test.labels),
        "accuracy_after": accuracy(after, test.labels),
        "changed_predictions": int(changed.sum()),
        "swap": str(report),
    }


def run_pairs(task: Task, digits: Digits, encoded: Encoded, settings: Settings) -> dict[str, Any]:
    """Train the layer over token pairs on a task, and explain its predictions."""
    layer = train_layer(task, draw_train_pairs(task, digits, settings), encoded, settings)
    result = evaluate(layer, draw_test_pairs(task, digits, settings), encoded, digits)
    share = dict(zip(EXPERTS, result.share, strict=True))
    return {
        "accuracy": result.accuracy,
        "share": share,
        "expected_expert": task.expert,
        "most_relied_on": [EXPERTS[k] for k in result.leading],
        "first_sample": result.sample,
    }


def draw_train_pairs(task: Task, digits: Digits, settings: Settings) -> Pairs:
    generator = torch.Generator().manual_seed(settings.seed)
    return make_pairs(task, digits, digits.train, settings.train_pairs, generator)


def draw_test_pairs(task: Task, digits: Digits, settings: Settings) -> Pairs:
    generator = torch.Generator().manual_seed(settings.seed)
    return make_pairs(task, digits, digits.test, settings.test_pairs, generator)


def checkpoint_of(task: Task, out: Path) -> Path:
    return out / f"{task.name}.pt"


def save_checkpoint(model: PairClassifier, settings: Settings, target: Path) -> None:
    """Save the layer as the published code does, with the settings that the parameters do not determine.

    `python -m flmoe_kernels swap` converts such a file.
    """
    config = {"num_heads": settings.num_heads, "temperature": settings.temperature}
    content = {MODEL_KEY: model.layer.state_dict(), CONFIG_KEY: config}
    write_whole(target, partial(torch.save, content))


def swapped(model: PairClassifier, inputs: list[Tensor]) -> SwapReport:
    """The report of a swap of a copy of the model, compared on these inputs.

    Raises:
        RuntimeError: the layer was not swapped, for example because its results differ by more than rounding; the
            message has the reason.
    """
    report = flmoe_kernels.swap(copy.deepcopy(model), inputs=(inputs,))
    if not report.swapped:
        raise RuntimeError(f"the layer was not swapped: {report}")
    return report
