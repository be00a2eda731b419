"""Experts that record their attention, and readouts of their last layer's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.games.models import Inputs, expert_names
from flmoe_kernels.explain.games.tokens import per_feature, valid_tokens
from flmoe_kernels.layers.interaction_moe.architecture import FusionSpec, LayerSpec
from flmoe_kernels.layers.interaction_moe.fusion_transformer import FusionTransformer, called_parts
from flmoe_kernels.layers.interaction_moe.kernel_layer import validate_inputs
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.interaction_moe.structure import describe, describe_fusion
from flmoe_kernels.layers.parts import UnsupportedLayer, check_plain

from .integrated import LogitsOf
from .rollout import AttentionRecord, evaluation_copy, recording_copy

TOKENS, LATENT, ALL = READOUTS = ("tokens", "latent", "all")


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of an interaction layer and B samples: fusion models that record their attention."""

    names: tuple[str, ...]
    fusions: list[tuple[nn.Module, list[AttentionRecord]]]
    reweight: Callable[[Any, Any], Tensor]
    residual: bool
    inputs: Inputs

    @classmethod
    def of(cls, model: Any, inputs: Inputs, masks: Inputs | None, padded: bool = False) -> Experts:
        """Raises TypeError for another kind of layer, ValueError for a changed one or inputs that it refuses.

        padded: see RecordingAttention.
        """
        given: Any = inputs
        spec: LayerSpec | FusionSpec
        if isinstance(model, ReferenceInteractionMoE | FusionTransformer):
            require_unchanged(model)
        if isinstance(model, ReferenceInteractionMoE):
            spec, names = describe(model), expert_names(model)
            reweight: Callable[[Any, Any], Tensor] = evaluation_copy(model.reweight)
            fusions = [expert.fusion_model for expert in model.interaction_experts]
        elif isinstance(model, FusionTransformer):
            spec = describe_fusion(model, model.spec, called_parts(model.network))
            names, fusions = ("model",), [model]
            reweight = lambda x, masks: x[0].new_ones((len(x[0]), 1))  # noqa: E731
        else:
            raise TypeError(
                "model: expected InteractionMoE or its reference, or FusionTransformer, whose attention is "
                f"known, got {type(model).__name__}; swap() converts a published layer, and "
                "method='integrated_gradients' accepts any model"
            )
        parameter = fusions[0].network[0].norm1.weight
        widths = [spec.hidden_dim] * spec.num_modalities
        for m, x in enumerate(inputs if isinstance(inputs, list | tuple) else ()):
            if x is None:
                raise TypeError(
                    f"inputs[{m}]: expected a Tensor, got None; for a missing modality pass padding and its mask"
                )
        validate_inputs(widths, spec.num_patches, given, masks, parameter, complete=True)
        return cls(
            names=names,
            fusions=[recording_copy(fusion, padded) for fusion in fusions],
            reweight=reweight,
            residual=model.compat == "fl_i2moe",
            # Padded tokens may hold any value, also NaN.
            inputs=[
                None if x is None else torch.where(per_feature(ok, x), x, 0.0)
                for x, ok in zip(inputs, valid_tokens(inputs, masks), strict=True)
            ],
        )

    def run(
        self, e: int, inputs: Any, masks: Inputs | None
    ) -> tuple[Tensor, list[AttentionRecord]]:
        """Return the logits (B, C) of expert e and the records of its attentions, first layer first."""
        fusion, records = self.fusions[e]
        try:
            return fusion(inputs, masks), list(records)
        finally:
            records.clear()

    def scores(self, e: int, mixed: bool) -> LogitsOf:
        """A function of inputs and masks: logits (B, C) of expert e, times its weights if mixed."""

        def logits(inputs: Any, masks: Any) -> Tensor:
            own = self.run(e, inputs, masks)[0]
            return own * self.reweight(inputs, masks)[:, e : e + 1] if mixed else own

        return logits


def require_unchanged(layer: nn.Module, only: Sequence[str] = ()) -> None:
    """Raises UnsupportedLayer, a ValueError, for a layer with a forward hook or with a changed method."""
    try:
        check_plain(layer, "model", "attribute calls the parts of a layer", only)
    except UnsupportedLayer as error:
        raise UnsupportedLayer(
            f"{error}; pass a function that returns the layer's logits, with method='integrated_gradients'"
        ) from None


def check_readout(readout: str | int, modalities: int) -> None:
    """Raises TypeError or ValueError if readout is neither in READOUTS nor the number of a modality."""
    if isinstance(readout, str):
        check.require_choice("readout", readout, READOUTS)
    else:
        check.require_count("readout", readout, 0, modalities - 1)


def readout_weights(readout: str | int, valid: Sequence[Tensor]) -> Tensor:
    """Weight of each token of the last layer in the readout, (B, L) in float64; padding has one only in ALL."""
    whole = torch.cat(list(valid), dim=1).double()
    if readout == ALL:
        return torch.full_like(whole, 1.0 / whole.shape[1])
    if readout == TOKENS:
        return whole / whole.sum(dim=1, keepdim=True).clamp_min(1.0)
    parts = [x / x.sum(dim=1, keepdim=True).clamp_min(1.0) for x in (v.double() for v in valid)]
    if readout == LATENT:
        return torch.cat(parts, dim=1) / len(parts)
    return torch.cat([x * float(m == readout) for m, x in enumerate(parts)], dim=1)
