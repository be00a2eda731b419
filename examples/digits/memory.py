"""Peak memory of one training step, measured in a process of its own.

    python -m examples.digits.memory reference|fast SETTINGS_AS_JSON

A fresh process, because memory that earlier work has left with the allocator would hide what a step
takes. Prints how many bytes the resident set grew at most during the step, and how that was read.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from .data import NUM_CLASSES, NUM_TOKENS
from .settings import Settings
from .train import PairClassifier, make_optimizer, training_step

MODES = ("reference", "fast")
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
KERNEL_PEAK = "VmHWM of the kernel, reset before the step"
RUSAGE_PEAK = "ru_maxrss; only growth beyond the process's earlier peak is seen"


@dataclasses.dataclass(frozen=True)
class Peak:
    """Growth of the resident set in bytes and how it was measured."""

    bytes: int
    method: str


def measure(mode: str, settings: Settings) -> Peak:
    """Run this module on one layer in a fresh interpreter.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    command = [sys.executable, "-m", __name__, mode, json.dumps(dataclasses.asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of the {mode} layer failed:\n{done.stderr}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def main(mode: str, settings: Settings) -> Peak:
    """Measure a training step of one layer in this process."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    torch.manual_seed(settings.seed)
    model = PairClassifier(NUM_CLASSES, settings).train()
    if mode == "fast":
        from flmoe_kernels.published.swap import swap

        # Unchecked: the check would run the reference layer in this process as well.
        swap(model, check=False)
    optimizer = make_optimizer(model, settings)
    # Two samples load the libraries and make the gradients and the optimizer's state.
    training_step(model, optimizer, _batch(2, settings), settings.interaction_weight)
    batch = _batch(settings.batch_size, settings)
    before, method = _start()
    training_step(model, optimizer, batch, settings.interaction_weight)
    return Peak(max(_peak(method) - before, 0), method)


def _batch(samples: int, settings: Settings) -> tuple[list[Tensor], list[Tensor], Tensor]:
    inputs = [torch.randn(samples, NUM_TOKENS, settings.width) for _ in range(2)]
    masks = [torch.ones(samples, NUM_TOKENS, dtype=torch.bool) for _ in range(2)]
    return inputs, masks, torch.randint(NUM_CLASSES, (samples,))


def _start() -> tuple[int, str]:
    """The resident set now, and the method by which to read its peak later."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return _peak(RUSAGE_PEAK), RUSAGE_PEAK
    return _status("VmRSS"), KERNEL_PEAK


def _peak(method: str) -> int:
    if method == KERNEL_PEAK:
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(main(sys.argv[1], Settings(**json.loads(sys.argv[2]))))))
