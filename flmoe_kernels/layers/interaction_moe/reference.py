"""Interaction mixture of experts in plain PyTorch; reference for tests and benchmarks.

Mathematics: FL-I2MoE (arXiv 2603.13326) and its ancestor I2MoE (arXiv 2505.19190). It does exactly the work of the
published layer: every expert runs every perturbed view in a Python loop, attention materialises its (L, L) maps,
and each dropout is a separate operation. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.layers.modalities import (
    Masks,
    Modalities,
    prepare_modalities,
    present_modalities,
)
from flmoe_kernels.layers.parts import record_methods, separate
from flmoe_kernels.ops.interaction_losses import interaction_losses
from flmoe_kernels.ops.interaction_losses.reference import regression_losses

from .experts import ExpertAverage, InteractionExpert, Reweighting, fusion_width
from .fusion import Compat, Inputs, ReferenceFusionTransformer

Replacements = Sequence[Sequence[Tensor]]
Replacement = Literal["noise", "zero", "mean"]

# Options that the published layer does not have; the values give the published behaviour.
OPTIONS: dict[str, Any] = {
    "modality_dropout": 0.0,
    "replacement": "noise",
    "num_perturbed": None,
    "interaction_loss": True,
    "uniqueness": True,
}


@record_methods
class ReferenceInteractionMoE(nn.Module):
    """The layer as published: (M + 1)(M + 2) fusion passes in Python loops.

    Args:
        num_modalities: M, at least two.
        fusion_model: template fusion model; every expert gets a deep copy.
        fusion_sparse: also return gate losses, zeros if the fusion model is dense.
        hidden_dim: token width D.
        hidden_dim_rw: hidden width of the reweighting MLP.
        num_layer_rw: number of linear layers of the reweighting MLP.
        temperature_rw: temperature of the softmax over experts.
        modality_dropout: probability that a modality of a sample is dropped in training; at least one is kept.
        replacement: what replaces a modality in its view: "noise", N(0, 1), "zero", or "mean", the mean_vectors
            of the call.
        num_perturbed: number of modalities, chosen at random in every call, that have a view; None for all.
        interaction_loss: False: only the full view is computed, and the losses are zeros.
        uniqueness: False for only the synergy and the redundancy expert.
        reweighting: "mlp", or "average" for a softmax of E parameters, which are equal at first.
        backend: None or "reference".
    """

    regression: ClassVar[bool] = False  # whether losses use the logits instead of the latents
    reweight: Reweighting | ExpertAverage
    interaction_experts: Any  # a ModuleList of InteractionExpert

    def __init__(
        self,
        num_modalities: int,
        fusion_model: nn.Module,
        fusion_sparse: bool = False,
        hidden_dim: int = 256,
        hidden_dim_rw: int = 256,
        num_layer_rw: int = 2,
        temperature_rw: float = 1.0,
        *,
        modality_dropout: float = 0.0,
        replacement: Replacement = "noise",
        num_perturbed: int | None = None,
        interaction_loss: bool = True,
        uniqueness: bool = True,
        reweighting: Literal["mlp", "average"] = "mlp",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if num_modalities < 2:
            raise ValueError(f"num_modalities: expected at least 2, got {num_modalities}")
        check.require_choice("reweighting", reweighting, ("mlp", "average"))
        self.num_modalities = num_modalities
        self.fusion_sparse = fusion_sparse
        self.modality_dropout = modality_dropout
        self.replacement = replacement
        self.num_perturbed = num_perturbed
        self.interaction_loss = interaction_loss
        self.uniqueness = uniqueness
        self._check_options()
        modalities = getattr(fusion_model, "num_modalities", num_modalities)
        if modalities != num_modalities:
            raise ValueError(
                f"num_modalities: expected {modalities}, as in the fusion model, got {num_modalities}"
            )
        width = fusion_width(fusion_model)
        if width not in (None, hidden_dim):
            raise ValueError(
                f"hidden_dim: expected {width}, the fusion model's width, got {hidden_dim}"
            )
        num_experts = num_modalities + 2 if uniqueness else 2
        if reweighting == "average":
            self.reweight = ExpertAverage(num_experts)
        else:
            self.reweight = Reweighting(
                num_modalities, num_experts, hidden_dim, hidden_dim_rw, num_layer_rw, temperature_rw
            )
        self.interaction_experts = nn.ModuleList(
            InteractionExpert(copy.deepcopy(fusion_model), fusion_sparse)
            for _ in range(num_experts)
        )
        for part in self.interaction_experts.modules():
            if isinstance(getattr(type(part), "backend", None), property):
                part.backend = REFERENCE
        self._complete(backend)

    def _complete(self, backend: str | None) -> None:
        """Finish the construction; a subclass may have other backends."""
        if backend is not None:
            check.require_choice("backend", backend, (REFERENCE,))

    def extra_repr(self) -> str:
        changed = {name: getattr(self, name) for name in OPTIONS}
        return ", ".join(f"{name}={x!r}" for name, x in changed.items() if x != OPTIONS[name])

    @property
    def compat(self) -> Compat:
        learned = self.interaction_experts[0].fusion_model.pos_embed is not None
        return "i2moe" if learned else "fl_i2moe"

    def forward(
        self,
        inputs: Inputs,
        masks: Masks = None,
        *,
        replacements: Replacements | None = None,
        mean_vectors: Sequence[Tensor] | None = None,
    ) -> tuple:
        """Run every expert on every view.

        Args:
            inputs: M token sequences (B, L_m, D); None for a missing modality.
            masks: M masks (B, L_m), True (or 1) = valid; each may be None.
            replacements: `replacements[e][m]` (B, L_m, D) instead of fresh N(0, 1) noise.
            mean_vectors: with replacement="mean", M tensors (D,) or (L_m, D), the data set's means.

        Returns:
            (expert_outputs, weights (B, E), logits (B, C), losses [M + 2], gate_losses when
            fusion_sparse, latents [E x (B, M * D)] unless compat is "i2moe"). `expert_outputs[e][v]` is
            (logits, latent), or the logits alone when compat is "i2moe"; v = 0 is the full view.
            `gate_losses[e][v]` is the sum over sparse layers and modalities, differentiable.
            A view that does not exist, because its modality is missing or not perturbed, has
            latent 0 and enters no loss.
        """
        masks = check.padded_masks(masks, inputs)
        call = self._prepared(inputs, masks)
        return self._plain_forward(call, self._replacements(call, replacements, mean_vectors))

    def inference(self, inputs: Inputs, masks: Masks = None) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run only the full view: ([logits (B, C)] * E, weights (B, E), logits (B, C))."""
        return self._plain_inference(self._prepared(inputs, check.padded_masks(masks, inputs)))

    def _check_options(self) -> None:
        """Check the options, which may have been changed."""
        check.require_probability("modality_dropout", self.modality_dropout)
        check.require_choice("replacement", self.replacement, ("noise", "zero", "mean"))
        check.require_bool("interaction_loss", self.interaction_loss)
        check.require_bool("uniqueness", self.uniqueness)
        if self.num_perturbed is not None:
            check.require_count("num_perturbed", self.num_perturbed, 1, self.num_modalities)

    def _check_parts(self) -> None:
        """Check that the experts match the layer's options, for passes that call the experts."""
        count = self.num_modalities + 2 if self.uniqueness else 2
        if len(self.interaction_experts) != count:
            raise ValueError(
                f"uniqueness={self.uniqueness}: expected {count} experts, got {len(self.interaction_experts)}"
            )
        for e, expert in enumerate(self.interaction_experts):
            fusion = expert.fusion_model
            if isinstance(fusion, ReferenceFusionTransformer) and fusion.modality_dropout:
                raise ValueError(
                    f"interaction_experts.{e}.fusion_model.modality_dropout: expected 0, got "
                    f"{fusion.modality_dropout}; set it on the interaction layer"
                )

    def _prepared(self, inputs: Inputs, masks: Masks) -> Modalities:
        self._check_options()
        positions = self.interaction_experts[0].fusion_model.pos_embed
        tokens = 0 if positions is None else positions.shape[1] // self.num_modalities
        dropout = self.modality_dropout if self.training else 0.0
        return prepare_modalities(inputs, masks, tokens, dropout)

    def _replacements(
        self,
        call: Modalities,
        replacements: Replacements | None,
        mean_vectors: Sequence[Tensor] | None,
    ) -> Replacements | None:
        """What replaces each modality, [e][m] (B, L_m, D); None for noise."""
        if not self.interaction_loss:
            return None
        if (mean_vectors is None) == (self.replacement == "mean"):
            raise ValueError(
                f"mean_vectors: expected {'tensors' if mean_vectors is None else 'None'}, as replacement is "
                f"{self.replacement!r}"
            )
        if self.replacement == "noise":
            return replacements
        if replacements is not None:
            raise ValueError(f"replacements: expected None, as replacement is {self.replacement!r}")
        fills = [torch.zeros_like(x) for x in call.inputs]
        if mean_vectors is not None:
            fills = mean_values(mean_vectors, call)
        return [fills] * len(self.interaction_experts)

    def _perturbed(self, call: Modalities) -> list[int]:
        if not self.interaction_loss:
            return []
        present = [m for m, absent in enumerate(call.absent) if not absent]
        if self.num_perturbed is None:
            return present
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("num_perturbed: a CUDA graph would repeat the choice of modalities")
        return sorted(
            present[i] for i in torch.randperm(len(present))[: self.num_perturbed].tolist()
        )

    def _normalized(self, call: Modalities) -> tuple[bool, ...]:
        """Modalities whose pooled features are normalized: as published, those with a mask; never in I2MoE."""
        return call.masked if self.compat == "fl_i2moe" else (False,) * self.num_modalities

    def _weights(self, call: Modalities) -> Tensor:
        own = isinstance(self.reweight, (Reweighting, ExpertAverage))
        return self.reweight(call.inputs, call.masks, *([self._normalized(call)] if own else []))

    def _view_losses(self, views: Tensor, exists: Tensor | None, backend: str) -> list[Tensor]:
        if not self.interaction_loss:
            return separate(views.new_zeros(views.shape[0]))
        if self.regression:
            return regression_losses([list(expert.unbind(0)) for expert in views.unbind(0)], exists)
        return separate(interaction_losses(views, backend, exists))

    def _plain_forward(self, call: Modalities, replacements: Replacements | None) -> tuple:
        self._check_parts()
        replaced, exists = self._perturbed(call), present_modalities(call.inputs, call.masks)
        if exists is not None and check.readable(exists) and bool(exists.all()):
            exists = None
        views: dict[str, Any] = {} if exists is None else {"exists": exists}
        if len(replaced) < self.num_modalities:
            views["replaced"] = replaced
        runs = [
            expert.forward_multiple(
                *(call.inputs, call.masks),
                replacements=None if replacements is None else replacements[e],
                **views,
            )
            for e, expert in enumerate(self.interaction_experts)
        ]
        gate_losses: tuple = ()
        if self.fusion_sparse:
            runs, losses = (list(column) for column in zip(*runs, strict=True))
            gate_losses = (losses,)
        learned = self.compat == "i2moe"
        weights = self._weights(call)
        full = [views[0] if learned else views[0][0] for views in runs]
        logits = (torch.stack(full, dim=1) * weights.unsqueeze(2)).sum(dim=1)
        measured = [[self._measured(view) for view in views] for views in runs]
        stacked = torch.stack([torch.stack(views) for views in measured])
        if len(replaced) < self.num_modalities:
            batch, device = logits.shape[0], logits.device
            here = torch.tensor([m in replaced for m in range(self.num_modalities)], device=device)
            exists = here.expand(batch, -1) if exists is None else exists & here
        interaction = self._view_losses(stacked, exists, REFERENCE)
        if learned:
            return (runs, weights, logits, interaction, *gate_losses)
        own = [views[0][1] for views in runs]
        return (runs, weights, logits, interaction, *gate_losses, own)

    def _measured(self, view: Any) -> Tensor:
        """The part of a view's result on which the losses are defined: the latent, if the view returns one."""
        return view if isinstance(view, Tensor) else view[0 if self.regression else 1]

    def _plain_inference(self, call: Modalities) -> tuple[list[Tensor], Tensor, Tensor]:
        self._check_parts()
        results = [expert(call.inputs, call.masks) for expert in self.interaction_experts]
        if self.fusion_sparse:
            results = [result for result, _ in results]
        expert_logits = [x if self.compat == "i2moe" else x[0] for x in results]
        weights = self._weights(call)
        logits = (torch.stack(expert_logits, dim=1) * weights.unsqueeze(2)).sum(dim=1)
        return expert_logits, weights, logits


def mean_values(mean_vectors: Sequence[Tensor], call: Modalities) -> list[Tensor]:
    """Mean vectors (D,) or (L_m, D) of all modalities, expanded to (B, L_m, D)."""
    if not isinstance(mean_vectors, (list, tuple)) or len(mean_vectors) != len(call.inputs):
        got = type(mean_vectors).__name__
        got += f" of {len(mean_vectors)}" if isinstance(mean_vectors, (list, tuple)) else ""
        raise TypeError(f"mean_vectors: expected a list of {len(call.inputs)} Tensors, got {got}")
    values = []
    for m, (mean, x) in enumerate(zip(mean_vectors, call.inputs, strict=True)):
        name = f"mean_vectors[{m}]"
        if call.absent[m]:
            values.append(x)
            continue
        check.require_tensor(name, mean)
        if tuple(mean.shape) not in (x.shape[2:], x.shape[1:]):
            raise ValueError(
                f"{name}: expected {tuple(x.shape[2:])} or {tuple(x.shape[1:])}, got {tuple(mean.shape)}"
            )
        check.require_same(name, mean, f"inputs[{m}]", x)
        values.append(mean.expand_as(x))
    return values


def check_replacements(
    replacements: Replacements | None, call: Modalities, num_experts: int
) -> Replacements | None:
    """Check that replacements[e][m] has the shape, dtype and device of inputs[m], for all experts.

    In the result, None for a missing modality becomes its padded input.
    """
    if replacements is None:
        return None
    if not isinstance(replacements, (list, tuple)):
        raise TypeError(f"replacements: expected a list, got {type(replacements).__name__}")
    if len(replacements) != num_experts:
        raise ValueError(
            f"replacements: expected one list per expert, {num_experts}, got {len(replacements)}"
        )
    filled = []
    for e, each in enumerate(replacements):
        if isinstance(each, (list, tuple)) and len(each) == len(call.inputs):
            missing = zip(each, call.inputs, call.absent, strict=True)
            each = [x if noise is None and absent else noise for noise, x, absent in missing]
        check.require_replacements(f"replacements[{e}]", each, call.inputs)
        filled.append(each)
    return filled
