"""What one launch of each kernel must do: FLOP of its matrix products, exponentials, bytes from or to memory.

Bytes: every element of every tensor that a launch reads or writes, once. What a block reads again comes from L2
and is not counted, so they are a lower bound; so are the others, because tiles at a ragged edge are counted by
what is inside. FLOP are those of the kernel, not of the operator: what it makes again for each chunk of a width
counts each time, and a product that an expert's kind does without does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch


@dataclass(frozen=True)
class Work:
    """products: how matrix products run, "16" (16-bit operands), "tf32", or "tf32x3" (three for one)."""

    flop: float
    exponentials: float
    bytes: float
    products: str


def work(
    launch: Launch,
    dtype: torch.dtype,
    flop: float = 0.0,
    exponentials: float = 0.0,
    **moved: Any,
) -> Work:
    """With the launch's traffic; `moved` are arguments of `traffic`."""
    precision = launch.constants.get("PRECISION", "tf32x3")
    products = precision if dtype == torch.float32 else "16"
    return Work(flop, exponentials, traffic(launch, **moved), products)


def traffic(
    launch: Launch,
    *,
    unread: Collection[str] = (),
    twice: Collection[str] = (),
    share: Mapping[str, float] | None = None,
) -> float:
    """Bytes of the launch's tensors: those of `unread` not at all, those of `twice` (read and written) two times,
    and of some in `share` only a part. An element that an expanded tensor repeats counts once."""
    total = 0.0
    for name, value in launch.arguments.items():
        times = 0 if name in unread else 2 if name in twice else 1
        part = (share or {}).get(name, 1.0)
        total += sum(times * part * _bytes(x) for x in _tensors(value))
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _bytes(x: Tensor) -> int:
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * x.element_size()


def _chunks(width: int, chunk: int) -> int:
    return -(-width // chunk)


def pair_accumulate(launch: Launch, dtype: torch.dtype) -> Work:
    """Per pair and expert 2 R of the logit, and 2 V where sums of p c are taken (all but unique_a and null);
    the logit and its exponential again for each chunk of V."""
    c, a = launch.constants, launch.arguments
    pairs = a["q"][0].shape[0] * a["rows"] * a["columns"]
    experts, gates = len(c["S1"]), _chunks(c["V"], c["WIDE_V"])
    sums = sum(second + third > 0 for second, third in zip(c["S2"], c["S3"], strict=True))
    flop = pairs * (2 * c["R"] * experts * gates + 2 * c["V"] * sums)
    return work(launch, dtype, flop, pairs * experts * gates)


def pair_gradient(launch: Launch, dtype: torch.dtype) -> Work:
    """Per pair and expert 2 R of the logit and 2 R of the gradient, and 2 V where a cotangent has a product."""
    c, a = launch.constants, launch.arguments
    pairs = a["x"][0].shape[0] * a["length_x"] * a["length_z"]
    experts, gates = len(c["PRODUCT"]), _chunks(c["R"], c["WIDE_R"])
    each = 2 * c["R"] * experts + 2 * c["V"] * sum(c["PRODUCT"])
    return work(
        launch, dtype, pairs * (gates * each + 2 * c["R"] * experts), pairs * experts * gates
    )


def pair_map(launch: Launch, dtype: torch.dtype) -> Work:
    """Per pair and expert 2 R of the logit, and 2 V where a contribution has a product."""
    c, a = launch.constants, launch.arguments
    pairs = a["q"][0].shape[0] * (a["end"] - a["first"]) * a["columns"]
    experts = len(c["PRODUCT"])
    flop = pairs * (2 * c["R"] * experts + 2 * c["V"] * sum(c["PRODUCT"]))
    return work(launch, dtype, flop, pairs * experts)


# Per score: products over the whole width that every chunk of it makes again, and those that it splits.
_ATTENTION = {"attend": (1, 1), "query_gradient": (2, 1), "key_gradient": (2, 2)}
_ATTENTION_WRITES = {"out", "lse", "delta", "grad_q", "grad_k", "grad_v"}


def attention(
    kernel: str, launch: Launch, dtype: torch.dtype, scores: int, valid: float = 1.0
) -> Work:
    """scores: of all heads. 2 d FLOP for each product of a score, one exponential a score and chunk.

    valid: the share of rows that belong to a problem, which alone are read; all are written.
    """
    again, once = _ATTENTION[kernel]
    width = launch.constants["WIDTH"]
    chunks = _chunks(width, launch.constants["CHUNK"])
    read = set(launch.arguments) - _ATTENTION_WRITES
    if kernel != "attend":
        read |= {"lse", "out"}
    if kernel == "key_gradient":
        read.add("delta")
    flop = scores * 2 * width * (again * chunks + once)
    share = dict.fromkeys(read, valid)
    return work(launch, dtype, flop, scores * chunks, share=share)


# Exponentials of an activation's value, and of its value and derivative: erf takes one of its own.
_ACTIVATION = {0: (1, 2), 1: (1, 1), 2: (0, 0), 3: (1, 1)}


def routed_hidden(launch: Launch, dtype: torch.dtype, rows: int) -> Work:
    """2 D F FLOP a kept row, F activations."""
    return _routed_activated(launch, dtype, rows, 0)


def routed_hidden_gradient(launch: Launch, dtype: torch.dtype, rows: int) -> Work:
    """2 D F FLOP a kept row, F activations with their derivatives."""
    return _routed_activated(launch, dtype, rows, 1)


def _routed_activated(launch: Launch, dtype: torch.dtype, rows: int, of: int) -> Work:
    c = launch.constants
    return work(
        launch, dtype, 2 * rows * c["D"] * c["F"], rows * c["F"] * _ACTIVATION[c["ACT"]][of]
    )


def routed_rows(launch: Launch, dtype: torch.dtype, rows: int) -> Work:
    """2 INNER OUTER FLOP a kept row."""
    return work(launch, dtype, 2 * rows * launch.constants["INNER"] * launch.constants["OUTER"])


def routed_weight_gradient(launch: Launch, dtype: torch.dtype, rows: int) -> Work:
    """2 P Q FLOP a kept row; weights of rows are read for the bias alone."""
    c = launch.constants
    unread = () if launch.arguments["bias"] is not None else ("weight",)
    return work(launch, dtype, 2 * rows * c["P"] * c["Q"], unread=unread)


def routed_choice_gradient(launch: Launch, dtype: torch.dtype) -> Work:
    """Sums; the cotangent is read for the bias alone."""
    unread = () if launch.arguments["bias"] is not None else ("grad_out",)
    return work(launch, dtype, unread=unread)


def routing_gate(launch: Launch, dtype: torch.dtype) -> Work:
    """An exponential for each logit."""
    return work(launch, dtype, 0.0, launch.arguments["logits"].numel())


def linear_product(launch: Launch, dtype: torch.dtype) -> Work:
    """2 INNER OUTER FLOP a row and expert."""
    c, a = launch.constants, launch.arguments
    experts = a["a"][0].shape[0]
    return work(launch, dtype, 2 * experts * a["rows"] * c["INNER"] * c["OUTER"])


def linear_weight_gradient(launch: Launch, dtype: torch.dtype) -> Work:
    """2 P Q FLOP a row and expert."""
    c, a = launch.constants, launch.arguments
    experts = a["left"][0].shape[0]
    return work(launch, dtype, 2 * experts * a["rows"] * c["P"] * c["Q"])


def gelu(launch: Launch, dtype: torch.dtype) -> Work:
    """An exponential for erf, and in the gradient one for the density."""
    gradient = "grad_x" in launch.arguments
    return work(launch, dtype, 0.0, (1 + gradient) * launch.arguments["x"].numel())
