"""Fusion transformer over all modalities in plain PyTorch.

As published, attention materialises its (L, L) maps, and each dropout is
a separate operation. A sparse model has routed MLPs (arXiv 2103.13262) in encoder layers 0, 2, 4, ...
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.layers.modalities import (
    Masks,
    Modalities,
    prepare_modalities,
    valid_tokens,
)
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.ops.reweighting.reference import masked_mean

Compat = Literal["fl_i2moe", "i2moe"]
Inputs = Sequence[Tensor | None]

MLP_EXPANSION = 2


def is_sparse_layer(layer: int) -> bool:
    """Whether this encoder layer of a sparse fusion model has a routed MLP: 0, 2, 4, ..., as published."""
    return layer % 2 == 0


def sinusoidal_positions(
    length: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Positions (length, width): angle = pos / 10000^(2 * (d // 2) / width), sine in even d, cosine in odd."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    position = torch.arange(length, dtype=compute, device=device).unsqueeze(1)
    column = torch.arange(width, device=device)
    angle = position / torch.pow(10000.0, (2 * (column // 2)).to(compute) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(dtype)


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
    """Multi-head softmax attention with q and kv without bias, and the (L, L) probabilities in memory.

    Attributes:
        capture_attn: store the probabilities of every call in last_attn; default False (published: True).
        require_attn_grad: store them with their graph, so that a backward pass sets last_attn.grad.
        last_attn: (B, H, L, L) before dropout, None unless captured.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.capture_attn = self.require_attn_grad = False
        self.last_attn: Tensor | None = None
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def __getstate__(self) -> dict[str, Any]:
        # A map with a graph can be neither copied nor pickled.
        return {**self.__dict__, "last_attn": None}

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        heads, width = self.num_heads, dim // self.num_heads
        q = self.q(x).view(batch, length, heads, width).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, heads, width).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
        probabilities = scores.softmax(dim=-1)
        if self.capture_attn:
            self.last_attn = probabilities if self.require_attn_grad else probabilities.detach()
            if self.last_attn.requires_grad:
                self.last_attn.retain_grad()
        out = (self.attn_drop(probabilities) @ v).transpose(1, 2).reshape(batch, length, dim)
        return self.proj_drop(self.proj(out))


class EncoderLayer(nn.Module):
    """One fusion layer: attention over the concatenated modalities, then an MLP on every token.

    mlp: a routed MLP in a sparse layer, called once per modality, or None for a dense MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout: float,
        compat: Compat,
        mlp: RoutedMLP | None = None,
    ) -> None:
        super().__init__()
        self.compat = compat
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.attn = Attention(dim, num_heads, dropout)
        self.mlp = mlp or MLP(dim, MLP_EXPANSION * dim, dim, 2, nn.GELU(), dropout)

    def forward(self, x: list[Tensor], key_mask: Tensor | None = None) -> list[Tensor]:
        lengths = [part.shape[1] for part in x]
        tokens = torch.cat(x, dim=1)
        attended = self.attn(self.norm1(tokens), key_mask)
        # I2MoE adds the attention output to itself, not to the layer's input; its checkpoints need that.
        residual = attended if self.compat == "i2moe" else tokens
        tokens = residual + self.dropout1(attended)
        parts = torch.split(tokens, lengths, dim=1)
        if not isinstance(self.mlp, RoutedMLP):
            return [part + self.dropout2(self.mlp(self.norm2(part))) for part in parts]
        masks = [None] * len(x) if key_mask is None else torch.split(key_mask, lengths, dim=1)
        normed = [self.norm2(part) for part in parts]
        updates = update_by_modality(self.mlp, normed, masks)
        if self.attn.capture_attn:
            # Padded tokens change no result, but the maps have rows for them.
            updates = [
                u if mask is None else u + self.mlp.unrecorded(part, ~mask)
                for u, part, mask in zip(updates, normed, masks, strict=True)
            ]
        return [part + self.dropout2(u) for part, u in zip(parts, updates, strict=True)]


def update_by_modality(
    mlp: RoutedMLP, parts: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[Tensor]:
    """Call a routed MLP once per modality, as published; the gate keeps the sum of the losses, in any mode."""
    updates, losses = [], []
    for part, mask in zip(parts, masks, strict=True):
        updates.append(mlp(part, mask))
        losses.append(mlp.gate_loss(clear=False))
    known = [loss for loss in losses if loss is not None]
    if known and not (mlp.gate.training and torch.is_grad_enabled()):
        mlp.gate.set_loss(torch.stack(known).sum())
    return updates


class Head(nn.Module):
    """The linear classifier on a latent; parameters at fc.*."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(input_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class ReferenceFusionTransformer(nn.Module):
    """FusionTransformer in plain PyTorch, with the same arguments; backend: None or "reference"."""

    network: Any  # a Sequential of EncoderLayer, then the Head

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
        *,
        mlp_sparse: bool = False,
        num_experts: int | None = None,
        num_routers: int = 1,
        top_k: int = 2,
        gate: str = "GShardGate",
        modality_dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check.require_probability("modality_dropout", modality_dropout)
        if compat not in ("fl_i2moe", "i2moe"):
            raise ValueError(f"compat: expected 'fl_i2moe' or 'i2moe', got {compat!r}")
        for name, size in (
            ("num_modalities", num_modalities),
            ("hidden_dim", hidden_dim),
            ("output_dim", output_dim),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
        ):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if hidden_dim % num_heads:
            raise ValueError(
                f"hidden_dim: expected a multiple of num_heads={num_heads}, got {hidden_dim}"
            )
        if mlp_sparse and num_experts is None:
            raise ValueError("num_experts: mlp_sparse=True expected at least 1, got None")
        self.compat = compat
        self.num_modalities = num_modalities
        self.modality_dropout = modality_dropout

        def routed(layer: int) -> RoutedMLP | None:
            if num_experts is None or not mlp_sparse or not is_sparse_layer(layer):
                return None
            return RoutedMLP(
                num_experts,
                hidden_dim,
                MLP_EXPANSION * hidden_dim,
                nn.GELU(),
                n_router=num_routers,
                gate=gate,
                top_k=1 if gate == "SwitchGate" else top_k,
            )

        layers: list[nn.Module] = [
            EncoderLayer(hidden_dim, num_heads, dropout, compat, routed(i))
            for i in range(num_layers)
        ]
        self.network = nn.Sequential(*layers, Head(num_modalities * hidden_dim, output_dim))
        self.pos_embed: nn.Parameter | None = None
        if compat == "i2moe":
            if num_patches is None or num_patches < 1:
                raise ValueError(
                    f"num_patches: compat='i2moe' expected at least 1, got {num_patches}"
                )
            self.pos_embed = nn.Parameter(torch.zeros(1, num_modalities * num_patches, hidden_dim))
        self._complete(backend)

    def _complete(self, backend: str | None) -> None:
        """Finish the construction; a subclass may have other backends."""
        if backend is not None:
            check.require_choice("backend", backend, (REFERENCE,))

    def forward(
        self, inputs: Inputs, masks: Masks = None, return_latent: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classify token sequences.

        Args:
            inputs: M x (B, L_m, D); None for a missing modality (latent 0). It takes no sinusoidal positions, so
                the positions of later modalities shift.
            masks: M x (B, L_m), True (or 1) = valid; each may be None.
            return_latent: also return the latent (B, M * D), the concatenated means of each modality's tokens.
                With learned positions it is detached, as published.

        Returns:
            Logits (B, C), or logits and latent.
        """
        dropout = self.modality_dropout if self.training else 0.0
        logits, latent = self._plain(
            prepare_modalities(inputs, masks, self._patches() or 0, dropout)
        )
        return (logits, latent) if return_latent else logits

    def _patches(self) -> int | None:
        positions = self.pos_embed
        return None if positions is None else positions.shape[1] // self.num_modalities

    def _plain(self, call: Modalities) -> tuple[Tensor, Tensor]:
        latent = self._latent(call.inputs, call.masks)
        return self.network[-1](latent), self._returned(latent)

    def _returned(self, latent: Tensor) -> Tensor:
        """A latent that may be changed in place; detached with learned positions, as published."""
        return (latent if self.pos_embed is None else latent.detach()).clone()

    def _latent(self, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
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
            valid = torch.cat(valid_tokens(inputs, masks), dim=1)
            # The published code multiplies by the mask instead, which keeps NaN.
            tokens = torch.where(valid.unsqueeze(-1), tokens, 0.0)
        parts = list(torch.split(tokens, lengths, dim=1))
        *encoder, _ = self.network
        for layer in encoder:
            parts = layer(parts, valid)
        part_masks = [None] * len(parts) if valid is None else torch.split(valid, lengths, dim=1)
        return torch.cat(
            [masked_mean(part, m) for part, m in zip(parts, part_masks, strict=True)], dim=1
        )

    def gate_loss(self) -> Tensor:
        """The sum of the gate losses of all routed MLPs, zero if there are none; clears them."""
        parts = [part.gate_loss() for part in self.modules() if isinstance(part, RoutedMLP)]
        losses = [loss for loss in parts if loss is not None]
        return sum(losses, self.network[0].norm1.weight.new_zeros(()))
