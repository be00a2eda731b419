"""The interaction mixture of experts in plain PyTorch: the oracle, and the honest peer in benchmarks.

Mathematics: FL-I2MoE (arXiv 2603.13326) and its ancestor I2MoE (arXiv 2505.19190). Every expert runs
every perturbed view in a Python loop, attention materialises its (L, L) maps and each dropout is drawn on
its own: exactly the work that the published layer does. Parameter names are those of its checkpoints.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Compat = Literal["fl_i2moe", "i2moe"]
Masks = Sequence[Tensor | None] | None
Replacements = Sequence[Sequence[Tensor]]

TRIPLET_MARGIN = 1.0
TRIPLET_EPS = 1e-7
REWEIGHT_DROPOUT = 0.5


def sinusoidal_positions(
    length: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Positions (length, width): angle = pos / 10000^(2 * (d // 2) / width), sine in even d, cosine in odd."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    position = torch.arange(length, dtype=compute, device=device).unsqueeze(1)
    column = torch.arange(width, device=device)
    angle = position / torch.pow(10000.0, (2 * (column // 2)).to(compute) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(dtype)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x (B, L, D) over its valid tokens, the count clamped to at least one; plain mean without a mask."""
    if mask is None:
        return x.mean(dim=1)
    weight = mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)


class MLP(nn.Module):
    """Linear layers with an activation and dropout between them; parameters at network.{0,3,6,..}."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int,
        activation: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            if i:
                layers += [activation, nn.Dropout(dropout)]
            layers.append(nn.Linear(fan_in, fan_out))
        self.network = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Attention(nn.Module):
    """Multi-head softmax attention with q and kv without bias, and the (L, L) probabilities in memory."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        heads, width = self.num_heads, dim // self.num_heads
        q = self.q(x).view(batch, length, heads, width).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, heads, width).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
        probabilities = self.attn_drop(scores.softmax(dim=-1))
        out = (probabilities @ v).transpose(1, 2).reshape(batch, length, dim)
        return self.proj_drop(self.proj(out))


class EncoderLayer(nn.Module):
    """One fusion layer: attention over the concatenated modalities, then an MLP on every token."""

    def __init__(self, dim: int, num_heads: int, dropout: float, compat: Compat) -> None:
        super().__init__()
        self.compat = compat
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.attn = Attention(dim, num_heads, dropout)
        self.mlp = MLP(dim, 2 * dim, dim, 2, nn.GELU(), dropout)

    def forward(self, x: list[Tensor], key_mask: Tensor | None = None) -> list[Tensor]:
        lengths = [part.shape[1] for part in x]
        tokens = torch.cat(x, dim=1)
        attended = self.attn(self.norm1(tokens), key_mask)
        # I2MoE adds the attention output to itself, not to the layer's input; its checkpoints need that.
        residual = attended if self.compat == "i2moe" else tokens
        tokens = residual + self.dropout1(attended)
        parts = torch.split(tokens, lengths, dim=1)
        return [part + self.dropout2(self.mlp(self.norm2(part))) for part in parts]


class Head(nn.Module):
    """The linear classifier on a latent; parameters at fc.*."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(input_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class FusionTransformer(nn.Module):
    """The fusion model of one expert.

    Args:
        num_modalities: M, at least one.
        hidden_dim: token width D, divisible by num_heads.
        output_dim: number of classes C.
        num_layers: encoder layers, at least one.
        dropout: rate of every dropout inside.
        compat: "fl_i2moe" (pre-norm, sinusoidal positions, masks) or "i2moe" (learned positions).
        num_patches: tokens per modality; needed by "i2moe", whose positions are a parameter.

    Raises:
        ValueError: an argument outside these ranges.
    """

    def __init__(
        self,
        num_modalities: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int = 2,
        num_heads: int = 4,
        dropout: float = 0.5,
        compat: Compat = "fl_i2moe",
        num_patches: int | None = None,
    ) -> None:
        super().__init__()
        if compat not in ("fl_i2moe", "i2moe"):
            raise ValueError(f"compat: expected 'fl_i2moe' or 'i2moe', got {compat!r}")
        for name, value in (
            ("num_modalities", num_modalities),
            ("hidden_dim", hidden_dim),
            ("output_dim", output_dim),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if hidden_dim % num_heads:
            raise ValueError(
                f"hidden_dim: expected a multiple of num_heads={num_heads}, got {hidden_dim}"
            )
        self.compat = compat
        layers: list[nn.Module] = [
            EncoderLayer(hidden_dim, num_heads, dropout, compat) for _ in range(num_layers)
        ]
        self.network = nn.Sequential(*layers, Head(num_modalities * hidden_dim, output_dim))
        self.pos_embed: nn.Parameter | None = None
        if compat == "i2moe":
            if num_patches is None or num_patches < 1:
                raise ValueError(
                    f"num_patches: compat='i2moe' expected at least 1, got {num_patches}"
                )
            self.pos_embed = nn.Parameter(torch.zeros(1, num_modalities * num_patches, hidden_dim))

    def forward(self, inputs: Sequence[Tensor], masks: Masks = None) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and the latent (B, M * D) of token sequences (B, L_m, D); masks True = valid."""
        lengths = [x.shape[1] for x in inputs]
        tokens = torch.cat(list(inputs), dim=1)
        valid: Tensor | None = None
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        else:
            tokens = tokens + sinusoidal_positions(
                tokens.shape[1], tokens.shape[2], tokens.device, tokens.dtype
            )
            if masks is not None:
                valid = torch.cat(
                    [
                        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
                        if m is None
                        else m.to(torch.bool)
                        for x, m in zip(inputs, masks, strict=True)
                    ],
                    dim=1,
                )
                tokens = tokens * valid.unsqueeze(-1)
        parts = list(torch.split(tokens, lengths, dim=1))
        *encoder, head = self.network
        for layer in encoder:
            parts = layer(parts, valid)
        part_masks = [None] * len(parts) if valid is None else torch.split(valid, lengths, dim=1)
        latent = torch.cat(
            [masked_mean(part, m) for part, m in zip(parts, part_masks, strict=True)], dim=1
        )
        return head(latent), latent


class Reweighting(nn.Module):
    """Weights (B, E) of the experts from the pooled inputs: softmax(MLP(features) / temperature)."""

    def __init__(
        self,
        num_modalities: int,
        num_experts: int,
        hidden_dim: int,
        hidden_dim_rw: int,
        num_layers: int,
        temperature: float,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.mlp = MLP(
            hidden_dim * num_modalities,
            hidden_dim_rw,
            num_experts,
            num_layers,
            nn.ReLU(),
            REWEIGHT_DROPOUT,
        )

    def forward(self, inputs: Sequence[Tensor], masks: Masks = None) -> Tensor:
        features = reweighting_features(inputs, masks)
        return torch.softmax(self.mlp(features) / self.temperature, dim=1)


def reweighting_features(inputs: Sequence[Tensor], masks: Masks = None) -> Tensor:
    """Pooled inputs (B, M * D): masked mean, L2-normalised where a mask is given, plain mean elsewhere."""
    features = []
    for m, x in enumerate(inputs):
        mask = masks[m] if masks is not None else None
        # The floor of the norm, 1e-12, is 0 in float16: a modality of padding alone would give 0 / 0.
        pooled = masked_mean(x.float() if x.dtype == torch.float16 else x, mask)
        features.append(pooled if mask is None else F.normalize(pooled, p=2, dim=1))
    return torch.cat(features, dim=1).to(inputs[0].dtype)


class InteractionExpert(nn.Module):
    """One interaction expert: a fusion model of its own, run on the full input and on perturbed views."""

    def __init__(self, fusion_model: nn.Module) -> None:
        super().__init__()
        self.fusion_model = fusion_model

    def forward(self, inputs: Sequence[Tensor], masks: Masks = None) -> tuple[Tensor, Tensor]:
        return self.fusion_model(inputs, masks)

    def forward_views(
        self, inputs: Sequence[Tensor], masks: Masks, replacements: Sequence[Tensor] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """The full view, then for each modality a view with its features replaced by N(0, 1) noise."""
        views = [self(inputs, masks)]
        for m, x in enumerate(inputs):
            noise = torch.randn_like(x) if replacements is None else replacements[m]
            views.append(self([*inputs[:m], noise, *inputs[m + 1 :]], masks))
        return views


def uniqueness_loss(views: Sequence[Tensor], modality: int) -> Tensor:
    """Triplet loss of one uniqueness expert: close to views that lose another modality, far from its own."""
    anchor, negative = views[0], views[1 + modality]
    positives = [view for m, view in enumerate(views[1:]) if m != modality]
    losses = [
        F.triplet_margin_loss(
            anchor, positive, negative, margin=TRIPLET_MARGIN, p=2, eps=TRIPLET_EPS
        )
        for positive in positives
    ]
    return torch.stack(losses).mean()


def mean_cosine(views: Sequence[Tensor]) -> Tensor:
    """Mean over modalities and batch of cos(full view, view without the modality)."""
    anchor = F.normalize(views[0], p=2, dim=1)
    cosines = [(anchor * F.normalize(view, p=2, dim=1)).sum(dim=1).mean() for view in views[1:]]
    return torch.stack(cosines).mean()


def interaction_losses(views: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The M + 2 losses of experts' views[e][v] (B, *): uniqueness per modality, synergy, redundancy."""
    *unique, synergy, redundancy = views
    losses = [uniqueness_loss(expert, m) for m, expert in enumerate(unique)]
    return [*losses, mean_cosine(synergy), 1.0 - mean_cosine(redundancy)]


class ReferenceInteractionMoE(nn.Module):
    """The layer as published: (M + 1)(M + 2) fusion passes in Python loops.

    Args:
        num_modalities: M, at least two.
        fusion_model: template fusion model; every expert gets a deep copy.
        fusion_sparse: also return gate losses (zeros: this fusion model is dense).
        hidden_dim: token width D.
        hidden_dim_rw: hidden width of the reweighting MLP.
        num_layer_rw: its number of linear layers.
        temperature_rw: temperature of its softmax over experts.
    """

    reweight: Reweighting
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
    ) -> None:
        super().__init__()
        if num_modalities < 2:
            raise ValueError(f"num_modalities: expected at least 2, got {num_modalities}")
        self.num_modalities = num_modalities
        self.fusion_sparse = fusion_sparse
        num_experts = num_modalities + 2
        self.reweight = Reweighting(
            num_modalities, num_experts, hidden_dim, hidden_dim_rw, num_layer_rw, temperature_rw
        )
        self.interaction_experts = nn.ModuleList(
            InteractionExpert(copy.deepcopy(fusion_model)) for _ in range(num_experts)
        )

    @property
    def compat(self) -> Compat:
        learned = self.interaction_experts[0].fusion_model.pos_embed is not None
        return "i2moe" if learned else "fl_i2moe"

    def forward(
        self,
        inputs: Sequence[Tensor],
        masks: Masks = None,
        *,
        replacements: Replacements | None = None,
    ) -> tuple:
        """Run every expert on every view.

        Args:
            inputs: M token sequences (B, L_m, D).
            masks: M masks (B, L_m), True (or 1) = valid, or None each.
            replacements: replacements[e][m] (B, L_m, D) instead of fresh N(0, 1) noise.

        Returns:
            (expert_outputs, weights (B, E), logits (B, C), losses [M + 2], gate_losses when
            fusion_sparse, latents [E x (B, M * D)] unless compat is "i2moe"). expert_outputs[e][v] is
            (logits, latent), or the logits alone when compat is "i2moe"; v = 0 is the full view.
        """
        views = [
            expert.forward_views(inputs, masks, None if replacements is None else replacements[e])
            for e, expert in enumerate(self.interaction_experts)
        ]
        weights = self.reweight(inputs, masks)
        stacked = torch.stack([expert[0][0] for expert in views], dim=1)
        logits = (stacked * weights.unsqueeze(2)).sum(dim=1)
        gates = [[logits.new_zeros(()) for _ in expert] for expert in views]
        gate_losses = (gates,) if self.fusion_sparse else ()
        if self.compat == "i2moe":
            outputs = [[view[0] for view in expert] for expert in views]
            return (outputs, weights, logits, interaction_losses(outputs), *gate_losses)
        losses = interaction_losses([[view[1] for view in expert] for expert in views])
        latents = [expert[0][1] for expert in views]
        return (views, weights, logits, losses, *gate_losses, latents)

    def inference(
        self, inputs: Sequence[Tensor], masks: Masks = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The full view alone: ([logits (B, C)] * E, weights (B, E), logits (B, C))."""
        expert_logits = [expert(inputs, masks)[0] for expert in self.interaction_experts]
        weights = self.reweight(inputs, masks)
        logits = (torch.stack(expert_logits, dim=1) * weights.unsqueeze(2)).sum(dim=1)
        return expert_logits, weights, logits
