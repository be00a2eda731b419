"""Stand-in for the published sparse MLP: FastMoE 1.1 with the lineage's changes.

It has the published code's peculiarities (docs/fastmoe.md): weights are not renormalised after a drop, GShard and
Switch keep only the last call's loss, padding counts, Switch adds its noise, NaiveGate's loss has no gradient,
NoisyGate's loss adds up in all modes, topk_logits grows. Names, attributes and parameters are the published ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import fastmoe
from tests.support.fastmoe import _Expert

GATES = ("NaiveGate", "GShardGate", "SwitchGate", "AddtionalNoisyGate")


class NaiveGate(fastmoe.NaiveGate):
    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int = 2,
        gate_bias: bool = True,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        self.topk_logits: list[Tensor] = []

    def reset_topk_logit(self) -> None:
        self.topk_logits = []

    def forward(self, x: Tensor, return_all_scores: bool = False) -> tuple[Tensor, ...]:
        chosen = super().forward(x, return_all_scores)
        self.topk_logits.append(chosen[0])
        return chosen


def pruned(index: Tensor, capacity: int, experts: int) -> Tensor:
    return fastmoe.prune_gate_by_capacity(index, torch.full((experts,), capacity), experts)


class GShardGate(NaiveGate):
    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 2,
        capacity: tuple[float, float] = (1.2, 2.4),
        random_routing: bool = False,
        gate_bias: bool = True,
    ) -> None:
        assert topk == 2, "topk should be 2"
        super().__init__(d_model, num_expert, world_size, 2, gate_bias)
        self.capacity, self.random_routing = capacity, random_routing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index, weight, logits = super().forward(x, return_all_scores=True)
        shares = torch.bincount(index[:, 0], minlength=self.tot_expert) / len(x)
        self.set_loss((shares * logits.softmax(1).mean(0)).mean() * self.num_expert**2)
        rate = self.capacity[0 if self.training else 1]
        places = math.ceil(rate * len(x)) * self.top_k // self.tot_expert
        index = pruned(index, places, self.tot_expert)
        if self.random_routing:
            unlucky = 2 * weight[:, 1] < torch.rand(len(x), device=x.device)
            index[:, 1].masked_fill_(unlucky, -1)
        self.topk_logits.append(index)
        return index, weight


class SwitchGate(NaiveGate):
    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] = (1.2, 2.4),
        gate_bias: bool = True,
    ) -> None:
        assert topk == 1, "topk should be 1"
        super().__init__(d_model, num_expert, world_size, 1, gate_bias)
        self.switch_eps, self.capacity = switch_eps, capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        if self.training:
            logits = logits + 1.0 + self.switch_eps * (2.0 * torch.rand_like(logits) - 1.0)
        scores = logits.float().softmax(-1)
        weight, index = scores.topk(1, dim=-1)
        rate = self.capacity[0 if self.training else 1]
        index = pruned(index, math.ceil(rate * len(x) / self.num_expert), self.tot_expert)
        kept = index[index >= 0]
        shares = torch.bincount(kept, minlength=self.tot_expert) / kept.numel()
        self.set_loss((shares * scores.sum(0) / kept.numel()).sum() * self.tot_expert)
        self.topk_logits.append(index)
        return index, weight.to(x.dtype)


class AddtionalNoisyGate(fastmoe.NoisyGate):
    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(d_model, num_expert, world_size, top_k)
        self.topk_logits: list[Tensor] = []
        self.indicates: Any = None
        self.is_full_modality = False

    def reset_topk_logit(self) -> None:
        self.topk_logits = []

    def set_loss(self, loss: Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        clean = x @ self.w_gate
        deviation = (self.softplus(x @ self.w_noise) + self.noise_epsilon) * self.training
        noisy = clean + torch.randn_like(clean) * deviation
        best, order = noisy.topk(min(self.top_k + 1, self.tot_expert), dim=1)
        index, weight = order[:, : self.top_k], self.softmax(best[:, : self.top_k])
        self.topk_logits.append(index)
        gates = torch.zeros_like(noisy).scatter(1, index, weight)
        load = self._gates_to_load(gates)
        if self.training:
            load = self._prob_in_top_k(clean, noisy, deviation, best).sum(0)
        self.set_loss(self.cv_squared(gates.sum(0)) + self.cv_squared(load))
        return index, weight


class FMoETransformerMLP(nn.Module):
    """apart: separate parameters for every expert, as in FastMoE 1.1 before the lineage's change."""

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        d_hidden: int = 4096,
        activation: nn.Module | None = None,
        expert_dp_comm: str = "none",
        expert_rank: int = 0,
        n_router: int = 1,
        gate: Any = "AddtionalNoisyGate",
        world_size: int = 1,
        top_k: int = 2,
        gate_hook: Any = None,
        mask: Any = None,
        mask_dict: Any = None,
        apart: bool = False,
    ) -> None:
        super().__init__()
        gate = globals()[gate] if isinstance(gate, str) else gate
        activation = nn.GELU() if activation is None else activation
        self.num_expert, self.d_model, self.top_k = num_expert, d_model, top_k
        self.world_size, self.slice_size, self.slice_group = world_size, 1, None
        self.gate_hook, self.mask, self.mask_dict = gate_hook, mask, mask_dict
        self.last_topk_indices: Tensor | None = None
        self.last_topk_scores: Tensor | None = None
        self.last_tot_expert = num_expert * world_size
        self.capture_topk_pre_mix = False
        self.last_topk_pre_mix: Tensor | None = None
        self.gate = gate(d_model, num_expert, world_size, top_k)
        self.experts: nn.Module = _Expert(num_expert, d_model, d_hidden, activation)
        if apart:
            ones = [_Expert(1, d_model, d_hidden, activation) for _ in range(num_expert)]
            self.experts = nn.ModuleList(ones)
            return
        self.n_router = n_router
        routers = {str(r): gate(d_model, num_expert, world_size, top_k) for r in range(n_router)}
        self.all_gates = nn.ModuleDict(routers)
        self.gate = self.all_gates["0"]

    def run_experts(self, x: Tensor, counts: Tensor) -> Tensor:
        if not isinstance(self.experts, nn.ModuleList):
            return self.experts(x, counts)
        parts = zip(self.experts, x.split(counts.tolist()), counts.split(1), strict=True)
        return torch.cat([expert(part, count) for expert, part, count in parts])

    def forward(self, inp: Tensor) -> Tensor:
        self.last_topk_pre_mix = None
        x = inp.reshape(-1, self.d_model)
        index, weight = self.gate(x)
        self.last_topk_indices, self.last_topk_scores = index, weight
        rows = fastmoe.route(x, index, self.run_experts, self.num_expert)
        pre_mix = rows.view(-1, self.top_k, self.d_model)
        if self.capture_topk_pre_mix:
            self.last_topk_pre_mix = pre_mix
        return torch.bmm(weight.view(-1, 1, self.top_k), pre_mix).reshape(inp.shape)


def gate_loss(model: nn.Module, warnings: list[str] | None = None) -> Any:
    """Sum of gate losses, as in the published fusion Transformer: over all routers of all modules with routers."""
    taken = []
    for name, part in model.named_modules():
        for r in range(len(getattr(part, "all_gates", ()))):
            loss = part.all_gates[f"{r}"].get_loss()  # type: ignore[union-attr, index]
            if loss is not None:
                taken.append(loss)
            elif warnings is not None:
                warnings.append(f"{name}, router {r}: empty")
    return sum(taken)


def make_mlp(
    gate: str = "GShardGate",
    num_expert: int = 5,
    dim: int = 16,
    hidden: int = 24,
    *,
    seed: int = 0,
    **options: Any,
) -> FMoETransformerMLP:
    """A small sparse MLP with random parameters and biases; weights have the scale of nn.Linear."""
    torch.manual_seed(seed)
    options.setdefault("top_k", 1 if gate == "SwitchGate" else 2)
    mlp = FMoETransformerMLP(num_expert, dim, hidden, gate=gate, **options)
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            fan_in = parameter.shape[-1] if "weight" in name else 4
            parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
    return mlp


def lifted(module: nn.Module) -> Any:
    """The module in eval mode without dropped rows: the published code does not define which are dropped."""
    for part in module.modules():
        if hasattr(part, "capacity"):
            part.capacity = (9.0, 9.0)
    return module.eval()
