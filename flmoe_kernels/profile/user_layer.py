"""A user's own layer under the profiler: a checkpoint as the published layer and swapped, on random tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels._version import __version__
from flmoe_kernels.core import backend as backends
from flmoe_kernels.layers.interaction_moe.architecture import Architecture
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.published.convert import load_checkpoint, load_layer
from flmoe_kernels.published.report import SwappedLayer
from flmoe_kernels.published.swap import swap

from .cases import BOTH, DTYPES, FORWARD, dtype_name
from .memory import Call, peak_of
from .operators.interaction_moe import timed_call
from .registry import OURS, PEER, device_unavailable_reason
from .shapes import LayerShape

REFERENCE = backends.REFERENCE
TRAINING, INFERENCE = "training step", "inference"
PHASES = {TRAINING: BOTH, INFERENCE: FORWARD}


class UnsupportedRequest(ValueError):
    """The layer cannot be profiled as asked; the message names the argument, what it expected and what it got."""


@dataclass(frozen=True)
class UserLayer:
    """All that a fresh process needs to make a user's layer and a call of it again.

    Attributes:
        path: the checkpoint.
        batch: samples.
        tokens: of each modality; None for what learned positions fix.
        valid: of each modality's tokens, how many are not padding; None for all.
        num_heads, temperature, gate, top_k: see `published.convert.load_layer`.
        dtype: name to convert the layer to; None to leave it as it is saved.
        device: "cpu", "cuda" or "cuda:N".
    """

    path: str
    batch: int
    tokens: tuple[int, ...] | None = None
    valid: tuple[int, ...] | None = None
    num_heads: int | None = None
    temperature: float | None = None
    gate: str | None = None
    top_k: int | None = None
    dtype: str | None = None
    device: str = "cpu"

    def load(self) -> ReferenceInteractionMoE:
        """The published layer with the checkpoint's parameters.

        Raises:
            CheckpointError: see `published.convert.load_layer`.
        """
        layer = load_layer(
            self.path, self.num_heads, self.temperature, gate=self.gate, top_k=self.top_k
        )
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        return layer.to(device=self.device, dtype=dtype)

    def architecture(self) -> Architecture:
        return load_checkpoint(self.path, gate=self.gate, top_k=self.top_k)[1]

    def checked(self) -> UserLayer:
        """This with all tokens known.

        Raises:
            CheckpointError: no usable checkpoint.
            UnsupportedRequest: batch, tokens, masks, dtype or device do not fit it or this machine.
        """
        found = self.architecture()
        if self.batch < 1:
            raise UnsupportedRequest(f"batch: expected 1 at least, got {self.batch}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UnsupportedRequest(
                f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}"
            )
        if missing := device_unavailable_reason(self.device):
            raise UnsupportedRequest(f"device: {self.device!r}: {missing}")
        tokens = _tokens(self.tokens, found)
        _check_valid(self.valid, tokens, found)
        return dataclasses.replace(self, tokens=tokens)

    def shape(self, layer: ReferenceInteractionMoE) -> LayerShape:
        """As a shape of the registry, which tells FLOP and bytes."""
        assert self.tokens is not None
        found = self.architecture()
        return LayerShape(
            name=Path(self.path).stem,
            batch=self.batch,
            tokens=self.tokens,
            valid=(None,) * len(self.tokens) if self.valid is None else self.valid,
            dim=found.hidden_dim,
            heads=_heads_of(layer),
            layers=found.num_layers,
            classes=found.num_classes,
            temperature=float(layer.reweight.temperature),
            experts=0 if found.sparse is None else found.sparse.num_experts,
        )


def _tokens(given: tuple[int, ...] | None, found: Architecture) -> tuple[int, ...]:
    count = found.num_modalities
    if found.num_patches is not None:
        fixed = (found.num_patches,) * count
        if given not in (None, fixed):
            raise UnsupportedRequest(
                f"tokens: learned positions fix them to {_listed(fixed)}, got {_listed(given or ())}"
            )
        return fixed
    if given is None or len(given) != count or min(given) < 1:
        got = "none" if given is None else _listed(given)
        raise UnsupportedRequest(
            f"tokens: expected {count} numbers from 1, one for each modality, got {got}"
        )
    return given


def _check_valid(
    valid: tuple[int, ...] | None, tokens: tuple[int, ...], found: Architecture
) -> None:
    if valid is None:
        return
    if found.num_patches is not None:
        raise UnsupportedRequest("valid: a layer with learned positions takes no masks")
    fits = len(valid) == len(tokens) and all(
        1 <= n <= length for n, length in zip(valid, tokens, strict=True)
    )
    if not fits:
        raise UnsupportedRequest(
            f"valid: expected {len(tokens)} numbers from 1 to {_listed(tokens)}, got {_listed(valid)}"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _heads_of(layer: Any) -> int:
    return int(layer.interaction_experts[0].fusion_model.network[0].attn.num_heads)


def check_swap(user: UserLayer) -> SwappedLayer:
    """Compare the layer with its replacement, as `swap` does; the errors that it found.

    Raises:
        UnsupportedRequest: the layer would be left as it is, with the reason.
    """
    report = swap(user.load())
    if report.left:
        raise UnsupportedRequest(f"{user.path}: not swapped: {report.left[0].reason}")
    return report.swapped[0]


def contestants_of(user: UserLayer) -> list[tuple[str, str, str]]:
    """Name, kind and version: the swapped layer by the backend that it gets, then the reference.

    Raises:
        backend.BackendUnavailable: this package's kernels do not run on the device.
    """
    sample = next(user.load().parameters())
    name = backends.choose("interaction_moe", sample)
    if name == REFERENCE:
        raise backends.BackendUnavailable(
            f"interaction_moe: this package has no kernels for {dtype_name(sample.dtype)} on "
            f"{user.device} here, only the reference"
        )
    return [(name, OURS, __version__), (REFERENCE, PEER, torch.__version__)]


def user_peak(user: UserLayer, contestant: str, what: str) -> int | None:
    """Bytes that a call takes at most, see `memory.peak_bytes`; what: see `make_call`.

    Raises:
        RuntimeError: see there.
    """
    return peak_of(_warmed_call, user, contestant, what, device=user.device)


def _warmed_call(user: UserLayer, contestant: str, what: str) -> Call:
    # Of one sample: learned positions fix the tokens.
    warm = make_call(dataclasses.replace(user, batch=1), contestant, what)
    warm()
    warm()
    return make_call(user, contestant, what)


def make_call(user: UserLayer, contestant: str, what: str) -> Call:
    """One training step or inference of the layer; parameters, inputs and masks are made here.

    A training step: forward with dropout and fresh noise, a task loss, the interaction and gate losses, backward
    into every parameter; no optimizer.
    """
    layer: Any = user.load()
    if contestant != REFERENCE:
        layer = InteractionMoE.adopt(layer, backend=contestant)
    inputs, masks = make_inputs(user, next(layer.parameters()))
    return timed_call(PHASES[what], layer, inputs, masks)


def make_inputs(user: UserLayer, like: Tensor) -> tuple[list[Tensor], list[Tensor | None] | None]:
    """N(0, 1) tokens, and masks where some are padding; a mask is None for a modality without."""
    assert user.tokens is not None
    generator = torch.Generator().manual_seed(1)
    width = user.architecture().hidden_dim
    inputs = [
        torch.randn(user.batch, length, width, generator=generator).to(like)
        for length in user.tokens
    ]
    if user.valid is None:
        return inputs, None
    masks: list[Tensor | None] = [
        None if count == length else (torch.arange(length) < count).expand(user.batch, length)
        for length, count in zip(user.tokens, user.valid, strict=True)
    ]
    return inputs, [None if m is None else m.contiguous().to(like.device) for m in masks]
