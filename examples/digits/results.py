"""What a run found, as values that JSON can hold."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flmoe_kernels.core.files import write_whole

from .data import EXPERTS, Task
from .measure import GROUPS, Difference, Times
from .memory import Peak
from .settings import Settings
from .token_pairs import PairResult
from .token_pairs import as_dict as pair_as_dict
from .train import Reliance

PACKAGES = ("torch", "numpy", "scikit-learn", "matplotlib")
# The demo itself is one; half a core's work of others already shows in the times of two threads.
BUSY_LOAD = 1.5


@dataclass(frozen=True)
class TaskResult:
    """One task: the trained reference model, and the same checkpoint with the layer swapped.

    Attributes:
        task: its labels and the expert that they should need.
        checkpoint: name of the file.
        before: test accuracy of the reference model.
        after: of the swapped one.
        changed: test pairs that the two classify differently.
        differences: by group, see `measure.compare`.
        reliance: of the swapped model on its experts.
    """

    task: Task
    checkpoint: str
    before: float
    after: float
    changed: int
    differences: dict[str, Difference]
    reliance: Reliance

    @property
    def as_expected(self) -> dict[str, bool]:
        """By each measure of reliance, whether it singles out the expert that the labels need."""
        return {name: most == self.task.expert for name, most in self.reliance.most.items()}

    @property
    def same(self) -> bool:
        return all(found.rounding_only for found in self.differences.values())


@dataclass(frozen=True)
class Results:
    """Everything that a run found. Times in seconds, memory in bytes; load is the system's load
    average just before the timing, in which the training on one thread counts for one."""

    settings: Settings
    images: dict[str, int]
    encoder_accuracy: tuple[float, float]
    tasks: tuple[TaskResult, ...]
    pairs: tuple[PairResult, ...]
    times: dict[str, Times]
    memory: dict[str, Peak]
    load: float
    seconds: float

    @property
    def same(self) -> bool:
        """Whether the two layers agree on every task but for rounding."""
        return all(result.same for result in self.tasks)

    @property
    def busy(self) -> bool:
        """Whether other programs were running during the timing, so that times mean little."""
        return self.load > BUSY_LOAD

    def worst(self, group: str) -> Difference:
        """The largest difference of a group over all tasks."""
        found = [result.differences[group] for result in self.tasks]
        return max(found, key=lambda difference: difference.largest)

    def same_in(self, group: str) -> bool:
        return all(result.differences[group].rounding_only for result in self.tasks)

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": dataclasses.asdict(self.settings),
            "samples_seen": self.settings.samples_seen,
            "versions": _versions(),
            "machine": _machine(),
            "images": self.images,
            "encoder_test_accuracy": dict(zip(("a", "b"), self.encoder_accuracy, strict=True)),
            "tasks": {result.task.name: _task_as_dict(result) for result in self.tasks},
            "token_pair_layer": {result.task.name: pair_as_dict(result) for result in self.pairs},
            "largest_difference": {group: self.worst(group).largest for group in GROUPS},
            "same_but_for_rounding": self.same,
            "seconds": {
                name: {**dataclasses.asdict(times), "speed_up": times.speed_up}
                for name, times in self.times.items()
            },
            "peak_memory_of_a_training_step": {
                name: dataclasses.asdict(peak) for name, peak in self.memory.items()
            },
            "load_average_before_timing": self.load,
            "total_seconds": self.seconds,
        }


def write_json(results: Results, target: Path) -> None:
    text = json.dumps(results.as_dict(), indent=2, allow_nan=False) + "\n"
    write_whole(target, text)


def _task_as_dict(result: TaskResult) -> dict[str, Any]:
    task = result.task
    by_expert = {
        name: dict(zip(EXPERTS, values, strict=True))
        for name, values in dataclasses.asdict(result.reliance).items()
    }
    return {
        "label": task.meaning,
        "classes": task.num_classes,
        "chance": task.chance,
        "checkpoint": result.checkpoint,
        "accuracy_before": result.before,
        "accuracy_after": result.after,
        "changed_predictions": result.changed,
        "differences": {
            group: {**dataclasses.asdict(found), "rounding_only": found.rounding_only}
            for group, found in result.differences.items()
        },
        "experts": by_expert,
        "expected_expert": task.expert,
        "most_relied_on": result.reliance.most,
        "as_expected": result.as_expected,
    }


def _versions() -> dict[str, str]:
    from flmoe_kernels import __version__

    versions = {"python": platform.python_version(), "flmoe-kernels": __version__}
    for name in PACKAGES:
        versions[name] = importlib.metadata.version(name)
    return versions


def _machine() -> dict[str, Any]:
    import torch

    from flmoe_kernels.core.backend import available_backends, instruction_set

    return {
        "architecture": platform.machine(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "backends": list(available_backends()),
    }
