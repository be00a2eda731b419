"""PairInteractionMoE: a classifier with exact Shapley values and interaction indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import without_autocast
from flmoe_kernels.layers.modalities import drop_modalities, present_modalities
from flmoe_kernels.layers.parts import RECOMPUTES, check_plain, record_methods
from flmoe_kernels.ops.interaction_losses import interaction_losses as losses_of
from flmoe_kernels.ops.pair_moe.call import REDUCE_EXPERTS, REDUCE_POOL
from flmoe_kernels.ops.pair_moe.kinds import DEFAULT_KINDS

from .arguments import (
    Inputs,
    batch_of,
    cast_inputs,
    plain_tokens,
    require_finite_logits,
    validate_sizes,
)
from .experts import ExpertTable
from .explanation import PairExplanation, explain_pairs
from .output import PairOutput
from .sides import ProjectedPair, Side, join

# Options that the repr shows if they differ from the default.
_DEFAULTS = {
    **{"top_k": None, "temperature": 1.0, "token_outputs": False},
    **{"modality_dropout": 0.0, "backend": None},
}
# Methods that compute the logits; `explain` may have a wrapper, as under FSDP2.
EXPLAINED = ("forward", "_enter", "_tokens", "_project", "_pool", "_classify")
_VARIANTS = 3  # of a pair's sides: as given, first one replaced, second one replaced


@record_methods
class PairInteractionMoE(nn.Module):
    """A mixture of interaction experts over all token pairs of all modality pairs.

    The tokens of a modality, and a learned anchor token that is never masked, go through the modality's LayerNorm
    and, in each pair of modalities, through one linear map to the vectors of `pair_moe`. The pooled messages of
    expert e in pair p go through the expert's linear head, which all modality pairs share:

        logits = bias + sum over p, e of pooled[p, e] @ head[e] / normalizer

    Only the sum over pairs combines tokens, so the logit of a class is a 2-additive game over the tokens, and
    `explain` returns its exact Shapley values and interaction indices, by expert. A pair with an anchor is a
    token's contribution without a partner. The layer has no positions: if the order of tokens matters, the encoder
    must add them to the inputs.

    If a modality is missing, its anchor replaces all its tokens, with the same normalizer, so the logits contain
    less evidence. To train the layer for this case, use modality_dropout, or data with missing modalities.

    Under FSDP2, call register_fsdp_forward_method(layer, "explain"); otherwise explain gets sharded parameters.

    Args:
        dims: token width of each of M >= 2 modalities, each at least 2: a LayerNorm of one feature is constant.
        num_classes: C; None (only with token_outputs) for a layer without a head.
        kinds: 1 to 8 kinds of experts, see `pair_moe`; they are the experts of one modality pair. For the E
            experts of the whole layer see `experts`.
        rank, value_dim: widths R and V of the gate's vectors and of the messages.
        top_k: experts per token pair, 1 to len(kinds); None for all.
        temperature: temperature of the gate's softmax.
        normalizer: divisor of the sums over token pairs: about the number of token pairs of one modality pair
            in a typical sample, 256 for 16 x 16 tokens, 4096 for 64 x 64; a smaller divisor gives larger initial
            logits. It is constant, because a mean over the present tokens would make every token interact with
            every other token.
        token_outputs: also return updated sequences, so that layers can be stacked. Each token is added a linear
            map of what its pairs accumulate, divided by sqrt(normalizer), about the number of its partners. In a
            stack only the last layer is a 2-additive game, over its own inputs.
        modality_dropout: probability that a modality of a sample is dropped in training; at least one is kept.
        backend: "reference", "cpu" or "triton"; default by device, see flmoe_kernels.use_backend.

    Attributes:
        experts: E names: "unique_0", "unique_1", .. by modality, then the other kinds in their order; repeated
            kinds have the suffix "_2", ..; E = M + 2 for the default kinds.
        modality_pairs: the P = M (M - 1) / 2 pairs (m, n), m < n, in lexicographic order.
        pair_experts: the E_pair = len(kinds) expert names of every modality pair.

    Parameters (state_dict): anchors.{m} (dims[m]); norms.{m}.weight, .bias (dims[m]); projections.{p}.{a,b}.weight
        (E_pair * (R + V), dims), .bias; gate_bias (P, E_pair); head (E, V, C); bias (C); with token_outputs
        token_maps.{p}.{a,b}.weight (dims, V).

    Raises:
        TypeError, ValueError: an argument is invalid; the error names it, what was expected and what it got.

    Source: FL-I2MoE (arXiv 2603.13326) at the level of token pairs; the layer is new in this package.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        num_classes: int | None,
        kinds: Sequence[str] = DEFAULT_KINDS,
        rank: int = 32,
        value_dim: int = 64,
        top_k: int | None = None,
        temperature: float = 1.0,
        normalizer: float = 256.0,
        token_outputs: bool = False,
        modality_dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check.require_probability("modality_dropout", modality_dropout)
        validate_sizes(dims, num_classes, kinds, token_outputs)
        check.require_count("rank", rank, 1)
        check.require_count("value_dim", value_dim, 1)
        if top_k is not None:
            check.require_count("top_k", top_k, 1, len(kinds))
        check.require_positive("temperature", temperature)
        check.require_positive("normalizer", normalizer)
        if backend is not None:
            check.require_choice("backend", backend, backends.BACKENDS)
        self.dims = tuple(dims)
        self.rank, self.value_dim = rank, value_dim
        self.top_k, self.temperature = top_k, float(temperature)
        self.normalizer = float(normalizer)
        self.token_outputs = token_outputs
        self.modality_dropout = modality_dropout
        self.backend = backend
        self._table = ExpertTable.of(len(dims), kinds)
        self._make_parameters(num_classes)
        self.reset_parameters()

    def _make_parameters(self, num_classes: int | None) -> None:
        pairs, experts = self.modality_pairs, len(self.kinds)
        width = experts * (self.rank + self.value_dim)

        def maps(make: Callable[[int], nn.Linear]) -> nn.ModuleList:
            sides = ({"a": make(self.dims[m]), "b": make(self.dims[n])} for m, n in pairs)
            return nn.ModuleList(nn.ModuleDict(both) for both in sides)

        self.anchors = nn.ParameterList(nn.Parameter(torch.empty(dim)) for dim in self.dims)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.dims)
        self.projections: Any = maps(lambda dim: nn.Linear(dim, width))
        self.gate_bias = nn.Parameter(torch.empty(len(pairs), experts))
        self.head: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if num_classes is not None:
            shape = (len(self.experts), self.value_dim, num_classes)
            self.head = nn.Parameter(torch.empty(shape))
            self.bias = nn.Parameter(torch.empty(num_classes))
        self.token_maps: Any = None
        if self.token_outputs:
            # Without a bias, so that a token whose pairs add nothing stays unchanged.
            self.token_maps = maps(lambda dim: nn.Linear(self.value_dim, dim, bias=False))

    def reset_parameters(self) -> None:
        """Initialize this module's own parameters again; its parts have their own methods."""
        for anchor in self.anchors:
            nn.init.normal_(anchor)
        nn.init.zeros_(self.gate_bias)
        if self.head is not None and self.bias is not None:
            bound = self.value_dim**-0.5  # as nn.Linear
            nn.init.uniform_(self.head, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def num_classes(self) -> int | None:
        return None if self.head is None else self.head.shape[2]

    @property
    def kinds(self) -> tuple[str, ...]:
        return self._table.kinds

    @property
    def experts(self) -> tuple[str, ...]:
        return self._table.names

    @property
    def modality_pairs(self) -> tuple[tuple[int, int], ...]:
        return self._table.pairs

    @property
    def pair_experts(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(self.experts[e] for e in places) for places in self._table.places)

    def extra_repr(self) -> str:
        shown = (
            f"{self.dims}, num_classes={self.num_classes}, kinds={self.kinds}, rank={self.rank}, "
            f"value_dim={self.value_dim}, normalizer={self.normalizer:g}"
        )
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            shown += "" if value == default else f", {name}={value!r}"
        return shown

    def forward(
        self,
        inputs: Inputs,
        masks: Inputs | None = None,
        *,
        interaction_losses: bool = False,
        replacements: Inputs | None = None,
    ) -> PairOutput:
        """Classify; see PairOutput.

        Args:
            inputs: M x (B, L_m, dims[m]), any L_m; None for a missing modality, which is equivalent to a modality
                whose tokens are all masked. At least one modality is required.
            masks: M x (B, L_m), True or 1 = valid; each may be None. The values of masked tokens have no effect.
            interaction_losses: also return the M + 2 losses of FL-I2MoE on the latents. In view m, N(0, 1) noise
                replaces modality m's tokens (not its anchor; masks unchanged). Unlike in FL-I2MoE, the experts
                share the noise of a view, because the gate compares them on the same token pair. Each loss is a
                mean over the existing views: the view that replaces m exists for samples with modality m.
            replacements: the noise, M x (B, L_m, dims[m]), None for a missing modality; by default drawn from
                torch's generator. Only with interaction_losses.

        Raises:
            TypeError, ValueError: an argument is invalid; the error names it, what was expected and what it got.
            BackendUnavailable: the requested backend cannot run this.

        Cost: one call of pair_moe per modality pair, on three times the batch with losses; two more with
        token_outputs. Memory as in pair_moe: nothing of size L_m x L_n.
        """
        inputs, masks = self._enter(inputs, masks)
        if self.training and self.modality_dropout:
            masks = drop_modalities(inputs, masks, self.modality_dropout)
        chosen = self._table.with_losses() if interaction_losses else ()
        noise = self._noise(inputs, replacements, interaction_losses)
        tokens, valid = self._tokens(inputs, masks)
        pairs = self._project(tokens, valid)
        logits = expert_logits = latents = outputs = losses = None
        mass: tuple[Tensor, ...] = ()
        if noise is not None:
            replaced = self._project(self._tokens(noise, masks)[0], valid)
            views, mass = self._perturbed_latents(pairs, replaced)
            exists = present_modalities(inputs, masks)
            backend = backends.choose("pair_moe", views, self.backend)
            losses = losses_of(torch.stack([views[e] for e in chosen]), backend, exists)
            latents = views[:, 0].clone()
        elif self.head is not None:
            pooled, mass = self._pool(pairs)
            latents = _side_by_side(pooled)
        if self.head is not None and latents is not None:
            dtype = self.gate_bias.dtype
            logits, expert_logits = (x.to(dtype) for x in self._classify(latents))
        if self.token_outputs:
            outputs, mass = self._token_outputs(tokens, pairs)
        return PairOutput(logits, expert_logits, latents, mass, outputs, losses)

    @torch.no_grad()
    def explain(
        self,
        inputs: Inputs,
        masks: Inputs | None = None,
        target: Any = None,
    ) -> PairExplanation:
        """Compute exact Shapley values and interaction indices of one class's logit; see PairExplanation.

        The results are constants for autograd and for torch.func transforms. If a norm or projection was replaced,
        the new one must map each token by itself.

        Args:
            inputs, masks: as in forward.
            target: the class, an integer for all samples or (B,) integers; None for the class with the largest
                logit.

        Raises:
            TypeError, ValueError, BackendUnavailable: as in forward; ValueError for a layer without classes, for
                logits that are NaN or inf, and for a layer with a forward hook or with a changed method, which
                explain would ignore (`explain.shapley_interactions` calls such a layer).

        Cost: about four forward passes; nothing of size L_m x L_n. Tokens are projected in the parameters' dtype,
        also under autocast, and everything else is in the statistics dtype (see PairOutput). The values add up to
        the explanation's own logits; forward's logits differ from these by rounding in half precision.
        """
        if self.num_classes is None or self.head is None or self.bias is None:
            raise ValueError("explain: expected a layer with classes, got num_classes=None")
        check_plain(
            self, "layer", "explain() does not call forward; shapley_interactions() does", EXPLAINED
        )
        for hook in self._forward_pre_hooks.values():
            if isinstance(hook, RECOMPUTES):
                hook(self, ())
        inputs, masks = self._enter(inputs, masks)
        batch = batch_of(inputs)
        if target is not None:
            device = self.gate_bias.device
            target = check.require_classes("target", target, batch, self.num_classes, device)
        with without_autocast(self.gate_bias.device):
            pairs = [pair.frozen() for pair in self._project(*self._tokens(inputs, masks))]
            pooled, _ = self._pool(pairs)
            logits, expert_logits = self._classify(_side_by_side(pooled))
            require_finite_logits(logits)
            if target is None:
                target = logits.argmax(dim=1)
            return explain_pairs(
                pairs,
                self._table,
                self.head.detach().to(logits.dtype, copy=True),
                self.bias.detach().to(logits.dtype),
                self.normalizer,
                expert_logits,
                target.clone(),
            )

    def _enter(self, inputs: Inputs, masks: Inputs | None) -> tuple[Inputs, Inputs | None]:
        inputs, masks = cast_inputs(inputs, self.gate_bias), check.padded_masks(masks, inputs)
        check.require_inputs(self.dims, inputs, masks, self.gate_bias, optional=True)
        backends.choose("pair_moe", self.gate_bias, self.backend)
        return inputs, masks

    def _noise(self, inputs: Inputs, replacements: Inputs | None, wanted: bool) -> Inputs | None:
        if replacements is not None:
            if not wanted:
                raise ValueError("replacements: expected None, as interaction_losses is False")
            replacements = cast_inputs(replacements, self.gate_bias)
            check.require_replacements("replacements", replacements, inputs)
            return replacements
        if not wanted:
            return None
        return [None if x is None else torch.randn_like(x) for x in inputs]

    def _tokens(
        self, inputs: Inputs, masks: Inputs | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        return plain_tokens(inputs, masks, self.dims, self.gate_bias)

    def _project(
        self, tokens: Sequence[Tensor], valid: Sequence[Tensor | None]
    ) -> list[ProjectedPair]:
        batch, experts = tokens[0].shape[0], len(self.kinds)
        sequences, masks = [], []
        # torch.compile cannot trace zip over a ParameterList before torch 2.12.
        for m, (x, mask, norm) in enumerate(zip(tokens, valid, self.norms, strict=True)):
            anchor = self.anchors[m]
            sequences.append(norm(torch.cat([x, anchor.expand(batch, 1, -1)], dim=1)))
            masks.append(None if mask is None else nn.functional.pad(mask, (0, 1), value=True))

        def side(linear: nn.Module, m: int) -> Side:
            packed = linear(sequences[m]).unflatten(2, (experts, self.rank + self.value_dim))
            return Side(packed, masks[m], self.rank)

        options: dict[str, Any] = {
            "kinds": self.kinds,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "backend": self.backend,
        }
        pairs = []
        for (m, n), maps, bias in zip(
            self.modality_pairs, self.projections, self.gate_bias, strict=True
        ):
            gate = {**options, "gate_bias": bias}
            pairs.append(ProjectedPair(side(maps["a"], m), side(maps["b"], n), gate))
        return pairs

    def _pool(self, pairs: Sequence[ProjectedPair]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Pooled messages of all experts divided by the normalizer, (B, E, V) per modality pair; mass."""
        outputs = [pair.accumulate(REDUCE_POOL) for pair in pairs]
        pooled = [self._table.spread(out.y / self.normalizer, p) for p, out in enumerate(outputs)]
        return pooled, tuple(out.mass for out in outputs)

    def _perturbed_latents(
        self, full: Sequence[ProjectedPair], replaced: Sequence[ProjectedPair]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Latents (E, M + 1, B, P * V) of the full view and of the views with one modality replaced; mass.

        A modality pair has three variants for any number of modalities; they are stacked along the batch.
        """
        stacked = [
            pair.between(join((pair.a, noisy.a, pair.a)), join((pair.b, pair.b, noisy.b)))
            for pair, noisy in zip(full, replaced, strict=True)
        ]
        pooled, mass = self._pool(stacked)
        batch = full[0].a.packed.shape[0]
        variants = [x.unflatten(0, (_VARIANTS, batch)).unbind(0) for x in pooled]
        views = []
        for replaced_modality in (None, *range(len(self.dims))):
            parts = []
            for pair, latents in zip(self.modality_pairs, variants, strict=True):
                which = 1 + pair.index(replaced_modality) if replaced_modality in pair else 0
                parts.append(latents[which])
            views.append(_side_by_side(parts))
        return torch.stack(views, dim=1), tuple(x[:batch].clone() for x in mass)

    def _classify(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits (B, C) and the experts' parts (B, E, C) from latents (E, B, P * V), in their dtype."""
        assert self.head is not None
        assert self.bias is not None
        with without_autocast(latents.device):
            summed = latents.unflatten(2, (-1, self.value_dim)).sum(dim=2)
            expert_logits = (summed @ self.head.to(latents.dtype)).transpose(0, 1)
            return self.bias.to(latents.dtype) + expert_logits.sum(dim=1), expert_logits

    def _token_outputs(
        self, tokens: Sequence[Tensor], pairs: Sequence[ProjectedPair]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        added: list[list[Tensor]] = [[] for _ in tokens]
        masses = []
        for (m, n), pair, maps in zip(self.modality_pairs, pairs, self.token_maps, strict=True):
            own, partners = (side.accumulate(REDUCE_EXPERTS) for side in (pair, pair.swapped()))
            # narrow, not a slice: before torch 2.9, torch.export guards the batch size for a full slice.
            added[m].append(maps["a"](own.y.narrow(1, 0, tokens[m].shape[1])))
            added[n].append(maps["b"](partners.y.narrow(1, 0, tokens[n].shape[1])))
            masses.append(own.mass)
        scale = 1.0 / math.sqrt(self.normalizer)
        outputs = tuple(
            x + scale * torch.stack(parts).sum(dim=0)
            for x, parts in zip(tokens, added, strict=True)
        )
        return outputs, tuple(masses)


def _side_by_side(pooled: Sequence[Tensor]) -> Tensor:
    """Concatenate P tensors (B, E, V) to (E, B, P * V)."""
    return torch.stack(list(pooled), dim=2).transpose(0, 1).flatten(2)
