"""Settings of the smallest demo, and results of a run that never was."""

from __future__ import annotations

import torch

from examples.digits.data import EXPERTS, TASKS
from examples.digits.measure import GROUPS, Difference, Times
from examples.digits.memory import Peak
from examples.digits.results import Results, TaskResult
from examples.digits.settings import Settings
from examples.digits.token_pairs import PairResult, SampleExplanation
from examples.digits.train import Predictions, reliance

TINY = Settings(
    width=16,
    num_layers=1,
    num_heads=2,
    batch_size=4,
    steps=2,
    train_pairs=32,
    test_pairs=16,
    encoder_steps=2,
    timed_steps=1,
    timed_inferences=1,
    pair_steps=2,
    pair_batch_size=8,
)
# Of the layer over token pairs, by task: two tasks rely on the expert that they should need.
PAIR_SHARES = (
    (0.61, 0.11, 0.15, 0.13),
    (0.12, 0.52, 0.17, 0.19),
    (0.14, 0.41, 0.16, 0.29),
    (0.44, 0.10, 0.28, 0.18),
)


def made_up_pair_result(number: int) -> PairResult:
    image = [[0.0] * 8] * 8
    values, valid = [0.5] + [0.0] * 15, [True] * 16
    sample = SampleExplanation(
        digits=(3, 4),
        images=(image, image),
        label=1,
        guess=1,
        valid=(valid, valid),
        patches=(values, values),
        pairs=[[-0.1] * 16] * 16,
        error=(number + 1) * 1e-7,
    )
    return PairResult(TASKS[number], 0.91 + 0.01 * number, PAIR_SHARES[number], sample)


def made_up_results(relied_on: int, fast_error: float, load: float = 1.0) -> Results:
    """Results in which every task relied on one expert."""
    share = [0.1] * len(EXPERTS)
    share[relied_on] = 0.7
    logits = torch.tensor(share).view(1, 4, 1) * torch.tensor([1.0, -1.0])
    found = reliance(Predictions(logits.sum(1), torch.ones(1, 4), logits), torch.zeros(1).long())
    difference = Difference(fast_error, "there", 1.0, 1e-7, fast_error)
    tasks = tuple(
        TaskResult(task, f"{task.name}.pt", 0.9, 0.9, 0, dict.fromkeys(GROUPS, difference), found)
        for task in TASKS
    )
    times = {"training step": Times(2.0, 1.0, 1), "inference": Times(1.0, 0.5, 1)}
    peaks = {"reference": Peak(2**20, "made up"), "fast": Peak(0, "made up")}
    pairs = tuple(made_up_pair_result(number) for number in range(len(TASKS)))
    images = {"train": 2, "test": 1}
    return Results(TINY, images, (0.9, 0.9), tasks, pairs, times, peaks, load, 1.0)
