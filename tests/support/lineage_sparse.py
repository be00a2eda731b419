"""Stand-in for the published sparse MLP: FastMoE 1.1 with the lineage's changes.

It has the published code's peculiarities (docs/fastmoe.md): weights are not renormalised after a drop, GShard and
Switch keep only the last call's loss, padding counts, Switch adds its noise, NaiveGate's loss has no gradient,
NoisyGate's loss adds up in all modes, topk_logits grows. The published kernels drop the rows that come last in a
race; here the last rows of the call are dropped. Names, attributes and parameters are the published ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATES = ("NaiveGate", "GShardGate", "SwitchGate", "AddtionalNoisyGate")


class BaseGate(nn.Module):
    def __init__(self, num_expert: int, world_size: int) -> None:
        super().__init__()
        self.num_expert, self.world_size = num_expert, world_size
        self.tot_expert = num_expert * world_size
        self.loss: Tensor | None = None

    def set_loss(self, loss: Tensor) -> None:
        self.loss = loss

    def get_loss(self, clear: bool = True) -> Tensor | None:
        taken = self.loss
        if clear:
            self.loss = None
        return taken

    @property
    def has_loss(self) -> bool:
        return self.loss is not None

    def reset_topk_logit(self) -> None:
        self.topk_logits: list[Tensor] = []


class NaiveGate(BaseGate):
    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int = 2,
        gate_bias: bool = True,
    ) -> None:
        super().__init__(num_expert, world_size)
        self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)
        self.top_k = top_k
        self.topk_logits = []

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x)
        best, index = torch.topk(logits, self.top_k, dim=-1, sorted=False)
        self.topk_logits.append(index)
        self.set_loss(torch.zeros(1, requires_grad=True).to(x.device))
        return index, best.softmax(dim=-1), logits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.chosen(x)[:2]


def pruned(index: Tensor, capacity: int, experts: int) -> Tensor:
    """index with -1 for all rows of an expert after its first `capacity` rows, in flattened order."""
    left, kept = [capacity] * experts, index.reshape(-1).tolist()
    for place, expert in enumerate(kept):
        left[expert] -= 1
        if left[expert] < 0:
            kept[place] = -1
    return torch.tensor(kept, dtype=index.dtype, device=index.device).view_as(index)


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
        index, weight, logits = self.chosen(x)
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


class AddtionalNoisyGate(BaseGate):
    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size)
        self.w_gate = nn.Parameter(torch.zeros(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.zeros(d_model, self.tot_expert))
        self.top_k, self.noise_epsilon = top_k, 1e-2
        self.softplus, self.softmax = nn.Softplus(), nn.Softmax(1)
        for weight in (self.w_gate, self.w_noise):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.topk_logits: list[Tensor] = []
        self.indicates: Any = None
        self.is_full_modality = False

    def set_loss(self, loss: Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss

    def spread(self, x: Tensor) -> Tensor:
        return x.float().var() / (x.float().mean() ** 2 + 1e-10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        clean = x @ self.w_gate
        deviation = (self.softplus(x @ self.w_noise) + self.noise_epsilon) * self.training
        noisy = clean + torch.randn_like(clean) * deviation
        best, order = noisy.topk(min(self.top_k + 1, self.tot_expert), dim=1)
        index, weight = order[:, : self.top_k], self.softmax(best[:, : self.top_k])
        self.topk_logits.append(index)
        gates = torch.zeros_like(noisy).scatter(1, index, weight)
        if self.training:
            outside, inside = best[:, self.top_k - 1, None], best[:, self.top_k, None]
            rival = torch.where(noisy > inside, inside, outside)
            load = torch.special.ndtr((clean - rival) / deviation).sum(0)
        else:
            load = (gates > 0).sum(0)
        self.set_loss(self.spread(gates.sum(0)) + self.spread(load))
        return index, weight


class FMoELinear(nn.Module):
    def __init__(self, num_expert: int, in_feat: int, out_feat: int) -> None:
        super().__init__()
        self.num_expert, self.in_feat, self.out_feat = num_expert, in_feat, out_feat
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat))
        self.bias = nn.Parameter(torch.zeros(num_expert, out_feat))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        parts = x.split(counts)
        return torch.cat(
            [F.linear(p, w, b) for p, w, b in zip(parts, self.weight, self.bias, strict=True)]
        )


class _Expert(nn.Module):
    def __init__(self, num_expert: int, dim: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.htoh4 = FMoELinear(num_expert, dim, hidden)
        self.h4toh = FMoELinear(num_expert, hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        return self.h4toh(self.activation(self.htoh4(x, counts)), counts)


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

    def forward(self, inp: Tensor) -> Tensor:
        self.last_topk_pre_mix = None
        x = inp.reshape(-1, self.d_model)
        index, weight = self.gate(x)
        self.last_topk_indices, self.last_topk_scores = index, weight
        pre_mix = x.new_zeros(index.numel(), self.d_model)
        flat = index.reshape(-1)
        order = [(flat == e).nonzero().flatten() for e in range(self.num_expert)]
        rows, counts = torch.cat(order), [len(part) for part in order]
        parts = x[rows // self.top_k]
        if isinstance(self.experts, nn.ModuleList):
            split = parts.split(counts)
            done = [e(p, [len(p)]) for e, p in zip(self.experts, split, strict=True)]
            parts = torch.cat(done)
        else:
            parts = self.experts(parts, counts)
        pre_mix = pre_mix.index_add(0, rows, parts).view(-1, self.top_k, self.d_model)
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
