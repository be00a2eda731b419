"""One run from digits to results: train, save, swap, compare, measure."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from flmoe_kernels.core.backend import backend_status
from flmoe_kernels.core.files import write_whole
from flmoe_kernels.published.file import CONFIG_KEY, MODEL_KEY
from flmoe_kernels.published.swap import swap

from . import memory
from .data import TASKS, Digits, Encoded, Pairs, Task, encode, load, make_pairs
from .measure import Batch, Times, changed, compare, time_inference, time_training
from .results import Results, TaskResult
from .settings import Settings
from .token_pairs import PairResult, run_task
from .train import PairClassifier, predict, reliance, train


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def run_pipeline(settings: Settings, out: Path, console: Console) -> Results:
    """Run everything; checkpoints go to `out` as they are made, each whole.

    Raises:
        DemoError: the kernels are not built, or the swap left the layer.
    """
    start = time.perf_counter()
    # Asked first: nobody should train for minutes to learn that there is nothing to swap in.
    runs, reason = backend_status()["cpu"]
    if not runs:
        raise DemoError(reason)
    digits = load(settings.seed)
    images = {"train": len(digits.train), "test": len(digits.test)}
    console.print(
        f"{len(digits.labels)} handwritten digits: {images['train']} to train on, "
        f"{images['test']} held out. Training and freezing two small encoders."
    )
    with one_thread():
        encoded = encode(digits, settings.width, settings.seed, settings.encoder_steps)
        tasks = [_run_task(task, digits, encoded, settings, out, console) for task in TASKS]
        pairs = [_run_pairs(task, digits, encoded, settings, console) for task in TASKS]
    console.print("Timing both layers, then measuring their memory, each in a fresh process.")
    load_average = os.getloadavg()[0]
    held_out = draw_test_pairs(TASKS[-1], digits, settings)
    times = _times(tasks[-1], held_out, encoded, settings, out)
    peaks = {mode: memory.measure(mode, settings) for mode in memory.MODES}
    seconds = time.perf_counter() - start
    return Results(
        settings=settings,
        images=images,
        encoder_accuracy=encoded.accuracy,
        tasks=tuple(tasks),
        pairs=tuple(pairs),
        times=times,
        memory=peaks,
        load=load_average,
        seconds=seconds,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes on one thread.

    The same numbers then come out whatever the number of cores, and a busy core cannot stall the
    training: its operations are small, a second thread gains a third, and where that thread has to
    wait for a core, every one of them waits with it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw_train_pairs(task: Task, digits: Digits, settings: Settings) -> Pairs:
    generator = torch.Generator().manual_seed(settings.seed)
    return make_pairs(task, digits, digits.train, settings.train_pairs, generator)


def draw_test_pairs(task: Task, digits: Digits, settings: Settings) -> Pairs:
    generator = torch.Generator().manual_seed(settings.seed)
    return make_pairs(task, digits, digits.test, settings.test_pairs, generator)


def _run_task(
    task: Task, digits: Digits, encoded: Encoded, settings: Settings, out: Path, console: Console
) -> TaskResult:
    pairs = draw_train_pairs(task, digits, settings)
    reference = train(task, pairs, encoded, settings)
    checkpoint = out / f"{task.name}.pt"
    save_checkpoint(reference, settings, checkpoint)

    fast = load_checkpoint(task, settings, checkpoint)
    swap_layer(fast)

    test = draw_test_pairs(task, digits, settings)
    before, after = predict(reference, test, encoded), predict(fast, test, encoded)
    result = TaskResult(
        task=task,
        checkpoint=checkpoint.name,
        before=before.accuracy(test.labels),
        after=after.accuracy(test.labels),
        changed=changed(before.logits, after.logits),
        differences=compare(reference, fast, first_batch(test, encoded, settings), settings),
        reliance=reliance(after, test.labels),
    )
    console.print(f"{task.name}: {result.before:.1%} before the swap, {result.after:.1%} after.")
    return result


def _run_pairs(
    task: Task, digits: Digits, encoded: Encoded, settings: Settings, console: Console
) -> PairResult:
    pairs, held_out = (draw(task, digits, settings) for draw in (draw_train_pairs, draw_test_pairs))
    result = run_task(task, pairs, held_out, encoded, digits, settings)
    console.print(f"{task.name}: {result.accuracy:.1%} with the layer over token pairs.")
    return result


def save_checkpoint(model: PairClassifier, settings: Settings, target: Path) -> None:
    """Save the layer as the published code does, with the settings that parameters do not tell."""
    config = {"num_heads": settings.num_heads, "temperature": settings.temperature}
    content = {MODEL_KEY: model.layer.state_dict(), CONFIG_KEY: config}
    write_whole(target, lambda path: torch.save(content, path))


def load_checkpoint(task: Task, settings: Settings, path: Path) -> PairClassifier:
    """A reference model with the layer of a checkpoint, in eval mode."""
    model = PairClassifier(task.num_classes, settings)
    content = torch.load(path, map_location="cpu", weights_only=True)
    model.layer.load_state_dict(content[MODEL_KEY])
    return model.eval()


def swap_layer(model: PairClassifier) -> None:
    """Swap the model's layer in place.

    Raises:
        DemoError: it was left, with the reason.
    """
    report = swap(model)
    if not report.swapped:
        reasons = "; ".join(entry.reason for entry in report.left)
        raise DemoError(f"the layer was not swapped: {reasons or 'none was found'}")


def first_batch(pairs: Pairs, encoded: Encoded, settings: Settings) -> Batch:
    rows = slice(0, settings.batch_size)
    return (*pairs.batch(encoded, rows), pairs.labels[rows])


def _times(
    result: TaskResult, pairs: Pairs, encoded: Encoded, settings: Settings, out: Path
) -> dict[str, Times]:
    """Both layers with the parameters of one task; the others' differ in value, not in size."""
    reference, fast = (
        load_checkpoint(result.task, settings, out / result.checkpoint) for _ in range(2)
    )
    swap_layer(fast)
    batch = first_batch(pairs, encoded, settings)
    return {
        "training step": time_training(reference, fast, batch, settings),
        "inference": time_inference(reference, fast, batch, settings),
    }
