"""Stand-ins for the published layers: same class names, attributes and mathematics, two variants.

`fl` has masks, latents and sinusoidal positions. `i2` has learned positions, neither masks nor latents, and a
residual that adds the attention output to itself. Both are written from descriptions and do not need the
published code; their classes have the published names.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.lineage_sparse import FMoETransformerMLP, gate_loss


class Linear(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(fan_in, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class MLP(nn.Module):
    def __init__(
        self,
        fan_in: int,
        hidden: int,
        fan_out: int,
        layers: int,
        activation: nn.Module,
        rate: float,
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(rate)
        widths = [fan_in, *[hidden] * (layers - 1), fan_out]
        parts: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for i in range(1, layers):
            parts += [activation, self.drop, nn.Linear(widths[i], widths[i + 1])]
        self.network = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, rate: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.attn_drop = nn.Dropout(rate)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(rate)
        self.capture_attn, self.require_attn_grad = True, False
        self.last_attn: Tensor | None = None

    def forward(self, x: Tensor, kv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        q = self.q(x).unflatten(-1, heads)
        k, v = self.kv(kv).unflatten(-1, (2, *heads)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask[:, None, None] == 0, float("-inf"))
        attn = scores.softmax(-1)
        if self.capture_attn:
            self.last_attn = attn if self.require_attn_grad else attn.detach()
            if self.last_attn.requires_grad:
                self.last_attn.retain_grad()
        mixed = torch.einsum("bhij,bjhd->bihd", self.attn_drop(attn), v).flatten(2)
        return self.proj_drop(self.proj(mixed))


class _Layer(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        rate: float,
        self_attn: bool,
        sparse: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(rate)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout1, self.dropout2 = nn.Dropout(rate), nn.Dropout(rate)
        self.activation = nn.GELU()
        self.attn = Attention(dim, num_heads, rate)
        self.mlp_sparse, self.self_attn = sparse is not None, self_attn
        self.mlp: nn.Module = MLP(dim, 2 * dim, dim, 2, nn.GELU(), rate)
        if sparse is not None:
            self.mlp = FMoETransformerMLP(d_model=dim, d_hidden=2 * dim, **sparse)

    def finish(self, x: Tensor, lengths: list[int]) -> list[Tensor]:
        return [p + self.dropout2(self.mlp(self.norm2(p))) for p in x.split(lengths, dim=1)]


class _Fusion(nn.Module):
    layer: type[nn.Module]

    def __init__(
        self,
        num_modalities: int,
        num_patches: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.5,
        mlp_sparse: bool = False,
        self_attn: bool = True,
        num_experts: int = 4,
        num_routers: int = 1,
        top_k: int = 2,
        gate: str = "GShardGate",
        apart: bool = False,
        num_layers_pred: int = 1,
    ) -> None:
        super().__init__()
        top_k = 1 if gate == "SwitchGate" else top_k
        sparse: dict[str, Any] = {"num_expert": num_experts, "n_router": num_routers}
        sparse |= {"gate": gate, "top_k": top_k, "apart": apart}
        layers = [
            self.layer(
                hidden_dim,
                num_heads,
                dropout,
                self_attn,
                sparse if mlp_sparse and i % 2 == 0 else None,
            )
            for i in range(num_layers)
        ]
        head = Linear(hidden_dim * num_modalities, output_dim)
        self.network = nn.Sequential(*layers, head)
        self.pos_embed: nn.Parameter | None = None

    def gate_loss(self) -> Any:
        return gate_loss(self)


class fl:
    """The variant with masks."""

    compat = "fl_i2moe"

    class TransformerEncoderLayer(_Layer):
        def forward(self, x: list[Tensor], masks: list | None = None) -> list[Tensor]:
            lengths = [p.shape[1] for p in x]
            tokens = torch.cat(x, dim=1)
            if masks is None:
                masks = [tokens.new_ones(p.shape[:2], dtype=torch.float32) for p in x]
            normed = self.norm1(tokens)
            attended = self.attn(normed, normed, attn_mask=torch.cat(masks, dim=1))
            return self.finish(tokens + self.dropout1(attended), lengths)

    class Transformer(_Fusion):
        def positions(self, length: int, width: int, device: torch.device) -> Tensor:
            """Always in float32, so the sum fails with half precision weights."""
            pos = torch.arange(length, dtype=torch.float32, device=device)[:, None]
            column = torch.arange(width, dtype=torch.float32, device=device)[None]
            angle = pos / torch.pow(10000, (2 * (column // 2)) / width)
            table = torch.zeros(length, width, device=device)
            table[:, 0::2], table[:, 1::2] = angle[:, 0::2].sin(), angle[:, 1::2].cos()
            return table

        def forward(
            self, inputs: list[Tensor], masks: list | None = None, return_latent: bool = False
        ) -> Any:
            lengths = [x.shape[1] for x in inputs]
            tokens = torch.cat(inputs, dim=1)
            tokens = tokens + self.positions(tokens.shape[1], tokens.shape[2], tokens.device)
            if masks is not None:
                masks = [m.float() for m in masks]
                tokens = tokens * torch.cat(masks, dim=1).unsqueeze(-1)
            parts = list(tokens.split(lengths, dim=1))
            for layer in self.network[:-1]:
                parts = layer(parts, masks=masks)
            latent = torch.cat(self.pooled(parts, masks), dim=1)
            logits = self.network[-1](latent)
            return (logits, latent) if return_latent else logits

        def pooled(self, parts: list[Tensor], masks: list | None) -> list[Tensor]:
            if masks is None:
                return [p.mean(dim=1) for p in parts]
            weighted = [(p * m.unsqueeze(-1)).sum(1) for p, m in zip(parts, masks, strict=True)]
            counts = [m.sum(1, keepdim=True).clamp_min(1.0) for m in masks]
            return [w / c for w, c in zip(weighted, counts, strict=True)]

    class InteractionExpert(nn.Module):
        def __init__(self, fusion_model: nn.Module, fusion_sparse: bool) -> None:
            super().__init__()
            self.fusion_model, self.fusion_sparse = fusion_model, fusion_sparse

        def one(self, inputs: list[Tensor], masks: list | None, m: int | None) -> Any:
            if m is not None:
                noise = torch.randn_like(inputs[m])
                inputs = [*inputs[:m], noise, *inputs[m + 1 :]]
            return self.fusion_model(inputs, masks, return_latent=True)

        def with_loss(self, view: Any) -> Any:
            return (view, self.fusion_model.gate_loss()) if self.fusion_sparse else view

        def forward(self, inputs: list[Tensor], masks: list | None = None) -> Any:
            return self.with_loss(self.one(inputs, masks, None))

        def forward_with_replacement(
            self, inputs: list[Tensor], masks: list | None, replace_index: int
        ) -> Any:
            return self.with_loss(self.one(inputs, masks, replace_index))

        def forward_multiple(self, inputs: list[Tensor], masks: list | None = None) -> Any:
            views = [
                self.with_loss(self.one(inputs, masks, m)) for m in (None, *range(len(inputs)))
            ]
            return tuple(map(list, zip(*views, strict=True))) if self.fusion_sparse else views

    class MLPReWeighting(nn.Module):
        def __init__(self, m: int, e: int, dim: int, hidden: int, layers: int, t: float) -> None:
            super().__init__()
            self.temperature = t
            self.mlp = MLP(dim * m, hidden, e, layers, nn.ReLU(), 0.5)

        def features(self, x: Tensor, mask: Tensor | None) -> Tensor:
            if mask is None:
                return x.mean(dim=1)
            weight = mask.float().unsqueeze(-1)
            return F.normalize((x * weight).sum(1) / weight.sum(1).clamp_min(1.0), p=2, dim=1)

        def forward(self, inputs: list[Tensor], masks: list | None = None) -> Tensor:
            parts = masks or [None] * len(inputs)
            x = torch.cat([self.features(x, m) for x, m in zip(inputs, parts, strict=True)], dim=1)
            return torch.softmax(self.mlp(x) / self.temperature, dim=1)

    class InteractionMoE(nn.Module):
        def __init__(
            self,
            num_modalities: int = 3,
            fusion_model: nn.Module | None = None,
            fusion_sparse: bool = True,
            hidden_dim: int = 256,
            hidden_dim_rw: int = 256,
            num_layer_rw: int = 2,
            temperature_rw: float = 1,
        ) -> None:
            super().__init__()
            variant, branches = (
                i2 if type(self).__qualname__.startswith("i2") else fl,
                num_modalities + 2,
            )
            self.num_modalities, self.fusion_sparse = num_modalities, fusion_sparse
            self.reweight = variant.MLPReWeighting(
                num_modalities, branches, hidden_dim, hidden_dim_rw, num_layer_rw, temperature_rw
            )
            self.interaction_experts = nn.ModuleList(
                variant.InteractionExpert(copy.deepcopy(fusion_model), fusion_sparse)
                for _ in range(branches)
            )

        def every_view(self, inputs: list[Tensor], masks: list | None) -> tuple[list, list]:
            outputs: list[list] = [[] for _ in self.interaction_experts]
            gates: list[list] = [[] for _ in self.interaction_experts]
            for e, expert in enumerate(self.interaction_experts):
                for m in (None, *range(len(inputs))):
                    outputs[e].append(expert.one(inputs, masks, m))
                    if self.fusion_sparse:
                        gates[e].append(expert.fusion_model.gate_loss())
            return outputs, gates

        def forward(self, inputs: list[Tensor], masks: list | None = None) -> tuple:
            outputs, gate_losses = self.every_view(inputs, masks)
            weights = self.reweight(inputs, masks)
            logits = _mixed([views[0][0] for views in outputs], weights)
            losses = _losses([[view[1] for view in views] for views in outputs])
            gates = (gate_losses,) if self.fusion_sparse else ()
            return (outputs, weights, logits, losses, *gates, [views[0][1] for views in outputs])

        def inference(self, inputs: list[Tensor], masks: list | None = None) -> tuple:
            logits = [x.one(inputs, masks, None)[0] for x in self.interaction_experts]
            weights = self.reweight(inputs, masks)
            return logits, weights, _mixed(logits, weights)


class i2:
    """The older variant: no masks, learned positions, logits instead of latents."""

    compat = "i2moe"

    class TransformerEncoderLayer(_Layer):
        def forward(self, x: list[Tensor]) -> list[Tensor]:
            normed = self.norm1(torch.cat(x, dim=1))
            attended = self.attn(normed, normed)
            return self.finish(attended + self.dropout1(attended), [p.shape[1] for p in x])

    class Transformer(_Fusion):
        def __init__(
            self, num_modalities: int, num_patches: int, hidden_dim: int, *a: Any, **k: Any
        ):
            super().__init__(num_modalities, num_patches, hidden_dim, *a, **k)
            tokens = num_modalities * num_patches
            self.pos_embed = nn.Parameter(torch.randn(1, tokens, hidden_dim))

        def forward(self, inputs: list[Tensor], return_latent: bool = False) -> Any:
            parts = (torch.cat(inputs, dim=1) + self.pos_embed).split(
                [x.shape[1] for x in inputs], dim=1
            )
            for layer in self.network[:-1]:
                parts = layer(parts)
            latent = torch.cat([p.mean(dim=1) for p in parts], dim=1)
            logits = self.network[-1](latent)
            return (logits, latent.detach().clone()) if return_latent else logits

    class InteractionExpert(fl.InteractionExpert):
        def one(self, inputs: list[Tensor], masks: None, m: int | None) -> Tensor:
            if m is not None:
                noise = torch.randn_like(inputs[m])
                inputs = [*inputs[:m], noise, *inputs[m + 1 :]]
            return self.fusion_model(inputs)

        def forward(self, inputs: list[Tensor]) -> Any:
            return self.with_loss(self.one(inputs, None, None))

        def forward_with_replacement(self, inputs: list[Tensor], replace_index: int) -> Any:
            return self.with_loss(self.one(inputs, None, replace_index))

    class MLPReWeighting(fl.MLPReWeighting):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            x = torch.cat([x.mean(dim=1) for x in inputs], dim=1)
            return torch.softmax(self.mlp(x) / self.temperature, dim=1)

    class InteractionMoE(fl.InteractionMoE):
        def forward(self, inputs: list[Tensor]) -> tuple:
            outputs, gate_losses = self.every_view(inputs, None)
            weights = self.reweight(inputs)
            gates = (gate_losses,) if self.fusion_sparse else ()
            logits = _mixed([views[0] for views in outputs], weights)
            return (outputs, weights, logits, _losses(outputs), *gates)

        def inference(self, inputs: list[Tensor]) -> tuple:
            logits = [x.one(inputs, None, None) for x in self.interaction_experts]
            weights = self.reweight(inputs)
            return logits, weights, _mixed(logits, weights)


fl.Transformer.layer = fl.TransformerEncoderLayer
i2.Transformer.layer = i2.TransformerEncoderLayer


class MaxPooled(fl.Transformer):
    """The structure of a known fusion model with another forward, which only a comparison detects."""

    def pooled(self, parts: list[Tensor], masks: list | None) -> list[Tensor]:
        return [p.amax(dim=1) for p in parts]


class LateFusion(nn.Module):
    """A fusion model of another kind."""

    def __init__(self, num_modalities: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(num_modalities * hidden_dim, output_dim)

    def forward(self, inputs: list[Tensor], masks: Any = None, return_latent: bool = False) -> Any:
        latent = torch.cat([x.mean(dim=1) for x in inputs], dim=1)
        return (self.fc(latent), latent) if return_latent else self.fc(latent)


def _mixed(logits: list[Tensor], weights: Tensor) -> Tensor:
    return (torch.stack(logits, dim=1) * weights.unsqueeze(2)).sum(dim=1)


def _losses(views: list[list[Tensor]]) -> list[Tensor]:
    *unique, synergy, redundancy = views
    losses = []
    for m, expert in enumerate(unique):
        triplet = nn.TripletMarginLoss(margin=1.0, p=2, eps=1e-7)
        positives = [view for n, view in enumerate(expert[1:]) if n != m]
        losses.append(sum(triplet(expert[0], p, expert[1 + m]) for p in positives) / len(positives))
    for expert, flip in ((synergy, False), (redundancy, True)):
        cosines = [F.cosine_similarity(expert[0], view, dim=1).mean() for view in expert[1:]]
        mean = sum(cosines) / len(cosines)
        losses.append(1 - mean if flip else mean)
    return losses


def make_layer(
    variant: Any = fl,
    *,
    modalities: int = 2,
    dim: int = 16,
    classes: int = 3,
    layers: int = 2,
    heads: int = 2,
    patches: int = 5,
    sparse: bool = False,
    temperature: float = 1.0,
    reweight_layers: int = 2,
    seed: int = 0,
    fusion: Any = None,
    **options: Any,
) -> nn.Module:
    """A small published layer with random parameters, including LayerNorms and biases."""
    torch.manual_seed(seed)
    fusion_class = variant.Transformer if fusion is None else fusion
    model = fusion_class(modalities, patches, dim, classes, layers, heads, **options)
    layer = variant.InteractionMoE(
        modalities, model, sparse, dim, dim + 4, reweight_layers, temperature
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def make_sparse_layer(variant: Any = fl, gate: str = "GShardGate", **options: Any) -> nn.Module:
    """A published layer with sparse MLPs of 5 experts in fusion layers 0 and 2, and with gate losses."""
    settings = {"layers": 3, "mlp_sparse": True, "sparse": True, "num_experts": 5, **options}
    return make_layer(variant, gate=gate, **settings)
