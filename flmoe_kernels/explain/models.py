"""Logits of whatever is explained: the layers of this package, by expert too, and any other callable."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..interaction_moe import ReferenceInteractionMoE
from ..pair_moe import PairInteractionMoE

Inputs = Sequence[Tensor | None]


def expert_names(model: Any) -> tuple[str, ...]:
    """The experts that have logits of their own; none for a model that is not a layer of this package."""
    if isinstance(model, PairInteractionMoE):
        return model.experts
    if isinstance(model, ReferenceInteractionMoE):
        return (*(f"unique_{m}" for m in range(model.num_modalities)), "synergy", "redundancy")
    return ()


def expert_place(model: Any, expert: str | int | None) -> int | None:
    """Position of an expert given by name or position; None stays None.

    Raises:
        TypeError, ValueError: naming what was expected.
    """
    if expert is None:
        return None
    names = expert_names(model)
    if not names:
        raise ValueError(
            f"expert: expected None, as {type(model).__name__} is not a layer of this package, got "
            f"{expert!r}"
        )
    if isinstance(expert, str):
        check.require_choice("expert", expert, names)
        return names.index(expert)
    check.require_count("expert", expert, 0, len(names) - 1)
    return expert


def logits_of(model: Any, inputs: Inputs, masks: Inputs | None, expert: int | None) -> Tensor:
    """Logits (B, C) of the model, or of one of its experts before mixing.

    An expert of InteractionMoE has logits of its own, without its weight in the mixture; one of
    PairInteractionMoE has its part of the layer's logits.

    Raises:
        TypeError, ValueError: the model returned something else.
    """
    if isinstance(model, ReferenceInteractionMoE):
        given: Any = inputs
        experts, _, mixed = model.inference(given, masks)
        return mixed if expert is None else experts[expert]
    out = model(inputs, masks)
    if expert is not None:
        return out.expert_logits[:, expert]
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model: expected logits (B, C), or an object that has them, of (inputs, masks), got "
            f"{type(out).__name__}; swap() makes a published layer one of this package"
        )
    if logits.dim() != 2:
        raise ValueError(f"model: expected logits (B, C), got {tuple(logits.shape)}")
    return logits


def require_model(model: Any, masking: bool) -> None:
    """A model that can be asked for values.

    Raises:
        TypeError: no callable.
        ValueError: in training mode, or without masks where tokens are to be masked out.
    """
    if not callable(model):
        raise TypeError(f"model: expected a Module or a callable, got {type(model).__name__}")
    # A PairInteractionMoE draws nothing in either mode.
    if isinstance(model, nn.Module) and not isinstance(model, PairInteractionMoE):
        training = [name for name, part in model.named_modules() if part.training]
        if training:
            part = training[0] or type(model).__name__
            raise ValueError(
                f"model: expected eval mode, got {part} in training mode, whose dropout would be "
                "noise in every value; call model.eval()"
            )
    if isinstance(model, ReferenceInteractionMoE) and masking and model.compat == "i2moe":
        raise ValueError(
            "fill: expected 'zero' or 'mean' for a layer with learned positions (I2MoE), which takes "
            "no masks, got 'drop'"
        )


def add_tensor(hasher: Any, value: Tensor | None) -> None:
    """Shape, dtype and bytes of a tensor into a hash."""
    if value is None:
        hasher.update(b"none")
        return
    hasher.update(f"{tuple(value.shape)} {value.dtype}".encode())
    flat = value.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy().tobytes())


def model_digest(model: Any) -> str:
    """What tells one model from another: its class and, of a Module, every parameter and buffer.

    Of another callable only the name is known: what it closes over is not.
    """
    hasher = hashlib.sha256()
    kind = type(model) if isinstance(model, nn.Module) else model
    hasher.update(f"{kind.__module__}.{getattr(kind, '__qualname__', type(kind))}".encode())
    if isinstance(model, nn.Module):
        for name, value in model.state_dict().items():
            hasher.update(name.encode())
            add_tensor(hasher, value if isinstance(value, Tensor) else None)
    return hasher.hexdigest()
