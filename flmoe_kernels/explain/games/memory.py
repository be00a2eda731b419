"""Batch sizes from the memory that is available."""

from __future__ import annotations

from typing import Any

import torch

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.memory import available_bytes

from .models import Inputs, depends_on_batch

_LARGEST_GIVEN = 2**31  # of max_batch; torch's sizes have 64 bits
LARGEST = 256  # larger batches are not faster, and fewer batches can be shared among ranks
# Bytes of activations per byte of inputs: about ten rows of the inputs' width in each of about five experts.
_EXPANSION = 64
# Bytes of expanded inputs in a batch on the CPU; activations of larger batches do not fit in the caches. At mmimdb
# (0.5 MiB per sample) batches of 8 to 32 were faster than those of 256 (bench/results/NOTES.md). Without expanded
# inputs larger batches are faster.
_CPU_INPUTS = 2**24
_SHARE = 8  # one eighth of the available memory is used


def batch_size(sample_bytes: int, device: torch.device, expanded: bool = True) -> int:
    """Batch size for inputs of `sample_bytes` per coalition: a power of two from 1 to LARGEST.

    It is a power of two so that small changes of the available memory between runs do not change it: a model's
    last bits may depend on the batch size. expanded: whether the model gets its inputs once per coalition.
    """
    fitting = available_bytes(device) // (_SHARE * _EXPANSION * max(sample_bytes, 1))
    if device.type == "cpu" and expanded:
        fitting = min(fitting, _CPU_INPUTS // max(sample_bytes, 1))
    return min(LARGEST, 1 << max(int(fitting).bit_length() - 1, 0))


def choose_batch(
    max_batch: int | None, model: Any, inputs: Inputs, copies: int = 1, expanded: bool = True
) -> int:
    """Return max_batch or, if None, a batch size for these inputs, each held `copies` times; see batch_size.

    It is 1 for a model whose gates may drop tokens, so that logits do not depend on the batch.
    """
    if max_batch is not None:
        check.require_count("max_batch", max_batch, 1)
    if depends_on_batch(model):
        return 1
    if max_batch is not None:
        return min(int(max_batch), _LARGEST_GIVEN)
    given = [x for x in inputs if x is not None]
    each = copies * sum(x[:1].nbytes for x in given)
    return batch_size(each, given[0].device, expanded)


def require_room(name: str, count: int, least: int, each: int, device: torch.device) -> None:
    """Check for a count from `least` whose items of `each` bytes fit in half of the available memory."""
    check.require_count(name, count, least)
    most = available_bytes(device) // (2 * max(each, 1))
    if count > max(most, least):
        raise ValueError(
            f"{name}: expected an int from {least} to {most}, which is what memory allows, got {count}"
        )
