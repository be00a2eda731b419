"""Logits and digests of the explained model."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import autocast_dtype
from flmoe_kernels.layers.interaction_moe.fusion_transformer import FusionTransformer
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.pair_interaction_moe.module import EXPLAINED, PairInteractionMoE
from flmoe_kernels.layers.parts import UnsupportedLayer, check_plain, plain_module
from flmoe_kernels.layers.routed_mlp.gates import Gate

Inputs = Sequence[Tensor | None]

_OWN = __name__.partition(".")[0] + "."  # module prefix of this package's layers
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def expert_names(model: Any) -> tuple[str, ...]:
    """Names of the experts that have logits; empty for a model that is not a layer of this package."""
    if isinstance(model, PairInteractionMoE):
        return model.experts
    if isinstance(model, ReferenceInteractionMoE):
        unique = range(model.num_modalities if model.uniqueness else 0)
        return (*(f"unique_{m}" for m in unique), "synergy", "redundancy")
    return ()


def expert_place(model: Any, expert: str | int | None) -> int | None:
    """Position of an expert given by name or position; None stays None. Raises TypeError or ValueError."""
    if expert is None:
        return None
    names = expert_names(model)
    if not names:
        raise ValueError(
            f"expert: expected None, as {type(model).__name__} is not a layer of this package, got "
            f"{expert!r}"
        )
    return place_of(expert, names)


def place_of(expert: str | int, names: Sequence[str]) -> int:
    """Position among `names` of an expert given by name or position. Raises as `expert_place`."""
    if isinstance(expert, str):
        check.require_choice("expert", expert, names)
        return names.index(expert)
    check.require_count("expert", expert, 0, len(names) - 1)
    return expert


def describe(model: Any, expert: int | None, fill: str, **more: Any) -> dict[str, Any]:
    """Description of the logits, JSON serializable."""
    name = None if expert is None else expert_names(model)[expert]
    return {"of": type(model).__name__, "expert": name, "fill": fill, **more}


def logits_of(model: Any, inputs: Inputs, masks: Inputs | None, expert: int | None) -> Tensor:
    """Logits (B, C) of the model, or of one of its experts before mixing.

    Logits of an expert of InteractionMoE do not include its weight in the mixture. Logits of an expert of
    PairInteractionMoE are its part of the layer's logits. InteractionMoE runs `inference`, with fewer views than
    `forward`, unless it has a forward hook or another `forward`. Raises TypeError or ValueError if there are no
    logits.
    """
    mixture = isinstance(model, ReferenceInteractionMoE)
    if mixture and not changed_reason(model, ("forward",)):
        given: Any = inputs
        experts, _, mixed = model.inference(given, masks)
        return mixed if expert is None else experts[expert]
    if mixture:  # Without losses, forward computes one view and draws nothing.
        model = copy.copy(model)
        model.interaction_loss = False
    out = model(inputs, masks)
    logits = _of_forward(out, expert) if mixture else None
    if logits is None and expert is not None:
        by_expert = getattr(out, "expert_logits", None)
        logits = None if by_expert is None else by_expert[:, expert]
    elif logits is None:
        logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        name, hint = "logits", "swap() converts a published layer into one of this package"
        if mixture or isinstance(model, PairInteractionMoE):
            name = "logits" if expert is None else "expert_logits"
            hint = changed_reason(model, () if mixture else EXPLAINED) or hint
        raise TypeError(
            f"model: expected logits (B, C), or an object with `{name}`, from model(inputs, masks), got "
            f"{type(out).__name__}; {hint}"
        )
    if logits.dim() != 2:
        raise ValueError(f"model: expected logits (B, C), got {tuple(logits.shape)}")
    return logits


def _of_forward(out: Any, expert: int | None) -> Any:
    """Logits in the result of an interaction layer's forward; None if it has another form."""
    if not isinstance(out, tuple) or len(out) < 4 or not isinstance(out[0], list):
        return None
    if expert is None:
        return out[2]
    full = out[0][expert][0]
    return full if isinstance(full, Tensor) else full[0]


def changed_reason(model: nn.Module, only: Sequence[str] = ()) -> str:
    """Why a call of a layer may not compute what this package's class does, "" if it does; see `check_plain`."""
    try:
        check_plain(model, "model", only=only)
    except UnsupportedLayer as error:
        return str(error)
    return ""


def require_model(model: Any, masking: bool) -> None:
    """Check for a callable in eval mode that, for `masking`, takes masks. Raises TypeError or ValueError."""
    if not callable(model):
        raise TypeError(f"model: expected a Module or a callable, got {type(model).__name__}")
    # An unchanged PairInteractionMoE without modality dropout draws nothing in either mode.
    draws_nothing = is_plain_pair_layer(model) and not model.modality_dropout
    if isinstance(model, nn.Module) and not draws_nothing:
        training = [name for name, part in model.named_modules() if part.training]
        if training:
            part = training[0] or type(model).__name__
            raise ValueError(
                f"model: expected eval mode, got {part} in training mode, whose dropout would add "
                "noise to every value; call model.eval()"
            )
    learned = isinstance(model, ReferenceInteractionMoE | FusionTransformer)
    if learned and masking and model.compat == "i2moe":
        raise ValueError(
            "fill: expected 'zero' or 'mean' for a layer with learned positions (I2MoE), which takes "
            "no masks, got 'drop'"
        )


def depends_on_batch(model: Any) -> bool:
    """Whether a sample's logits depend on the other samples of its batch: a gate may drop tokens."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(part, Gate) and part.may_drop for part in parts)


def add_tensor(hasher: Any, value: Tensor | None) -> None:
    """Add shape, dtype and bytes of a tensor to a hash."""
    if value is None:
        hasher.update(b"none")
        return
    hasher.update(f"{tuple(value.shape)} {value.dtype}".encode())
    flat = value.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy().tobytes())


def is_plain_pair_layer(model: Any) -> bool:
    """Whether the logit is that of an unchanged PairInteractionMoE, see `changed_pairs_reason`."""
    return isinstance(model, PairInteractionMoE) and not changed_pairs_reason(model)


def changed_pairs_reason(layer: PairInteractionMoE) -> str:
    """Why the logit may be no 2-additive game, or may depend on the order of tokens; "" if neither."""
    if reason := changed_reason(layer, EXPLAINED):
        return reason
    parts: dict[str, tuple[nn.Module, type[nn.Module]]] = {
        f"norms.{m}": (norm, nn.LayerNorm) for m, norm in enumerate(layer.norms)
    }
    for p, maps in enumerate(layer.projections):
        parts |= {f"projections.{p}.{side}": (maps[side], nn.Linear) for side in ("a", "b")}
    try:
        for path, (part, kind) in parts.items():
            check_plain(plain_module(part, path, kind), path)
    except UnsupportedLayer as error:
        return str(error)
    return ""


def game_digest(
    model: Any, described: Mapping[str, Any], tensors: Sequence[Tensor | None], device: torch.device
) -> str:
    """Digest of a value function: the model, its description and the sample's tensors.

    It includes the autocast dtype, because half precision changes more than the last bits.
    """
    cast = autocast_dtype(device)
    hasher = hashlib.sha256(json.dumps([described, str(cast)], sort_keys=True).encode())
    hasher.update(model_digest(model).encode())
    for tensor in tensors:
        add_tensor(hasher, tensor)
    return hasher.hexdigest()


def model_digest(model: Any) -> str:
    """Digest of the class and, for a Module, of its parts, their settings and every tensor.

    Settings are a part's extra_repr and, for this package's layers, plain attributes (heads, temperature).
    Buffers include those that are not in the state_dict. For other callables it includes only the name, not the
    variables of the closure.
    """
    hasher = hashlib.sha256()
    kind = type(model) if isinstance(model, nn.Module) else model
    # The repr of a partial or an instance may contain an address, which differs between processes.
    name = getattr(kind, "__qualname__", type(kind).__qualname__)
    hasher.update(f"{kind.__module__}.{name}".encode())
    if isinstance(model, nn.Module):
        for name, part in model.named_modules(remove_duplicate=False):
            hasher.update(f"{name}: {type(part).__qualname__} {_settings(part)}".encode())
        for name, value in itertools.chain(
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        ):
            hasher.update(name.encode())
            add_tensor(hasher, value)
    return hasher.hexdigest()


def _settings(part: nn.Module) -> str:
    settings = [_ADDRESS.sub("", part.extra_repr())]
    if type(part).__module__.startswith(_OWN):
        settings += [
            f"{name}={value!r}"
            for name, value in sorted(vars(part).items())
            if isinstance(value, int | float | str | tuple)
            and name != "training"
            and not name.startswith("_")
        ]
    return ", ".join(settings)
