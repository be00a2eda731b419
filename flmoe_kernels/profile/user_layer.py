"""Profiling of a user's checkpoint: the reference and the swapped layer."""

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
    """The layer cannot be profiled; the message has the argument, the expected and the actual value."""


@dataclass(frozen=True)
class UserLayer:
    """All arguments that a fresh process needs to build a user's layer and a call.

    Attributes:
        path: of the checkpoint.
        batch: number of samples.
        tokens: of each modality; None if learned positions determine them.
        valid: number of tokens of each modality that are not padding; None for all.
        num_heads, temperature, layer, gate, top_k: see `published.convert.load_layer`.
        dtype: name of the dtype to convert the layer to; None for the saved dtype.
        device: "cpu", "cuda" or "cuda:N".
    """

    path: str
    batch: int
    tokens: tuple[int, ...] | None = None
    valid: tuple[int, ...] | None = None
    num_heads: int | None = None
    temperature: float | None = None
    layer: str | None = None
    gate: str | None = None
    top_k: int | None = None
    dtype: str | None = None
    device: str = "cpu"

    def load(self) -> ReferenceInteractionMoE:
        """Load the published layer with the checkpoint's parameters.

        Raises:
            CheckpointError: see `published.convert.load_layer`.
        """
        layer = load_layer(self.path, self.num_heads, self.temperature, **self._chosen())
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        return layer.to(device=self.device, dtype=dtype)

    def architecture(self) -> Architecture:
        return load_checkpoint(self.path, **self._chosen())[1]

    def _chosen(self) -> dict[str, Any]:
        return {"layer": self.layer, "gate": self.gate, "top_k": self.top_k}

    def checked(self) -> UserLayer:
        """Check the arguments and return them with all tokens.

        Raises:
            CheckpointError: the checkpoint cannot be used.
            UnsupportedRequest: batch, tokens, masks, dtype or device do not fit the checkpoint or this machine.
        """
        architecture = self.architecture()
        if self.batch < 1:
            raise UnsupportedRequest(f"batch: expected at least 1, got {self.batch}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UnsupportedRequest(
                f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}"
            )
        if missing := device_unavailable_reason(self.device):
            raise UnsupportedRequest(f"device: {self.device!r}: {missing}")
        tokens = _tokens(self.tokens, architecture)
        _check_valid(self.valid, tokens, architecture)
        return dataclasses.replace(self, tokens=tokens)

    def shape(self, layer: ReferenceInteractionMoE) -> LayerShape:
        """Return the shape of the layer, for FLOP and bytes."""
        assert self.tokens is not None
        architecture = self.architecture()
        return LayerShape(
            name=Path(self.path).stem,
            batch=self.batch,
            tokens=self.tokens,
            valid=(None,) * len(self.tokens) if self.valid is None else self.valid,
            dim=architecture.hidden_dim,
            heads=_heads_of(layer),
            layers=architecture.num_layers,
            classes=architecture.num_classes,
            temperature=float(layer.reweight.temperature),
            experts=0 if architecture.sparse is None else architecture.sparse.num_experts,
        )


def _tokens(given: tuple[int, ...] | None, layer: Architecture) -> tuple[int, ...]:
    count = layer.num_modalities
    if layer.num_patches is not None:
        fixed = (layer.num_patches,) * count
        if given not in (None, fixed):
            raise UnsupportedRequest(
                f"tokens: learned positions fix them to {_listed(fixed)}, got {_listed(given or ())}"
            )
        return fixed
    if given is None or len(given) != count or min(given) < 1:
        got = "none" if given is None else _listed(given)
        raise UnsupportedRequest(
            f"tokens: expected {count} positive numbers, one per modality, got {got}"
        )
    return given


def _check_valid(
    valid: tuple[int, ...] | None, tokens: tuple[int, ...], layer: Architecture
) -> None:
    if valid is None:
        return
    if layer.num_patches is not None:
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
    """Compare the layer with its replacement, as `swap` does; return the errors.

    Raises:
        UnsupportedRequest: `swap` would not replace the layer; the message has the reason.
    """
    report = swap(user.load())
    if report.left:
        raise UnsupportedRequest(f"{user.path}: not swapped: {report.left[0].reason}")
    return report.swapped[0]


def contestants_of(user: UserLayer) -> list[tuple[str, str, str]]:
    """Return name, kind and version of the swapped layer, with its default backend, and of the reference.

    Raises:
        backend.BackendUnavailable: this package's kernels do not run on the device.
    """
    sample = next(user.load().parameters())
    name = backends.choose("interaction_moe", sample)
    if name == REFERENCE:
        raise backends.BackendUnavailable(
            f"interaction_moe: this package has no kernels for {dtype_name(sample.dtype)} on "
            f"{user.device}, only the reference"
        )
    return [(name, OURS, __version__), (REFERENCE, PEER, torch.__version__)]


def user_peak(user: UserLayer, contestant: str, what: str) -> int | None:
    """Return the peak bytes of a call, see `memory.peak_bytes`; what: see `make_call`.

    Raises:
        RuntimeError: see `memory.peak_bytes`.
    """
    return peak_of(_warmed_call, user, contestant, what, device=user.device)


def _warmed_call(user: UserLayer, contestant: str, what: str) -> Call:
    # The small call has one sample and all tokens, because learned positions fix the tokens.
    warm = make_call(dataclasses.replace(user, batch=1), contestant, what)
    warm()
    warm()
    return make_call(user, contestant, what)


def make_call(user: UserLayer, contestant: str, what: str) -> Call:
    """Build a training step or an inference of the layer, with its parameters, inputs and masks.

    A training step is a forward with dropout and new noise, a task loss, the interaction and gate losses, and a
    backward into every parameter, without optimizer.
    """
    layer: Any = user.load()
    if contestant != REFERENCE:
        layer = InteractionMoE.adopt(layer, backend=contestant)
    inputs, masks = make_inputs(user, next(layer.parameters()))
    return timed_call(PHASES[what], layer, inputs, masks)


def make_inputs(user: UserLayer, like: Tensor) -> tuple[list[Tensor], list[Tensor | None] | None]:
    """Make N(0, 1) tokens, and masks if there is padding; the mask of a modality without padding is None."""
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
