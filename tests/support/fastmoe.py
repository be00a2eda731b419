"""Stand-in for the parts of FastMoE 1.1 that the published code uses.

FastMoE (github laekov/fastmoe) must be compiled and runs only on a GPU. These classes and functions have its names
and parameters and compute the same in plain PyTorch, in one process. FastMoE drops the rows that come last in a
race; here the last rows of the call are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class NaiveGate(BaseGate):
    """The chosen experts are sorted, the best first; FastMoE does not sort them."""

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

    def forward(self, x: Tensor, return_all_scores: bool = False) -> tuple[Tensor, ...]:
        logits = self.gate(x)
        best, index = logits.topk(self.top_k, dim=-1)
        self.set_loss(torch.zeros(1, requires_grad=True).to(x.device))
        chosen = (index, best.softmax(dim=-1))
        return (*chosen, logits) if return_all_scores else chosen


class NoisyGate(BaseGate):
    """Parameters and helpers; the published subclass has its own forward."""

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size)
        self.w_gate = nn.Parameter(torch.zeros(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.zeros(d_model, self.tot_expert))
        self.top_k, self.noise_epsilon = top_k, 1e-2
        self.softplus, self.softmax = nn.Softplus(), nn.Softmax(1)
        for weight in (self.w_gate, self.w_noise):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def _gates_to_load(self, gates: Tensor) -> Tensor:
        return (gates > 0).sum(0)

    def _prob_in_top_k(
        self, clean: Tensor, noisy: Tensor, deviation: Tensor, best: Tensor
    ) -> Tensor:
        """Probability that an expert is among the top_k if only its noise is drawn again; best (N, top_k + 1)."""
        outside, inside = best[:, self.top_k - 1, None], best[:, self.top_k, None]
        rival = torch.where(noisy > inside, inside, outside)
        return torch.special.ndtr((clean - rival) / deviation)

    def cv_squared(self, x: Tensor) -> Tensor:
        return x.float().var() / (x.float().mean() ** 2 + 1e-10)


class FMoELinear(nn.Module):
    def __init__(self, num_expert: int, in_feat: int, out_feat: int) -> None:
        super().__init__()
        self.num_expert, self.in_feat, self.out_feat = num_expert, in_feat, out_feat
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat))
        self.bias = nn.Parameter(torch.zeros(num_expert, out_feat))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        parts = x.type_as(self.weight).split(counts.tolist())
        return torch.cat(
            [F.linear(p, w, b) for p, w, b in zip(parts, self.weight, self.bias, strict=True)]
        )


class _Expert(nn.Module):
    def __init__(
        self, num_expert: int, d_model: int, d_hidden: int, activation: nn.Module, rank: int = 0
    ) -> None:
        super().__init__()
        self.htoh4 = FMoELinear(num_expert, d_model, d_hidden)
        self.h4toh = FMoELinear(num_expert, d_hidden, d_model)
        self.activation = activation

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.h4toh(self.activation(self.htoh4(x, counts)), counts)


def count_by_gate(
    index: Tensor, num_expert: int, world_size: int = 1, require_pos: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the choices by expert, and twice the choices per expert; -1 in index = dropped."""
    flat = index.reshape(-1)
    places = torch.cat([(flat == e).nonzero().flatten() for e in range(num_expert)])
    counts = torch.bincount(flat[places], minlength=num_expert)
    return places, counts, counts


def route(
    x: Tensor,
    index: Tensor,
    expert_fn: Callable[[Tensor, Tensor], Tensor],
    num_expert: int,
    world_size: int = 1,
    **unused: Any,
) -> Tensor:
    """Rows (N * K, D) of the chosen experts' outputs, zeros for dropped choices; x (N, D), index (N, K)."""
    places, counts, _ = count_by_gate(index, num_expert)
    out = expert_fn(x[places // (index.numel() // len(index))], counts)
    return out.new_zeros(index.numel(), out.shape[-1]).index_add(0, places, out)


def prune_gate_by_capacity(
    index: Tensor, capacity: Tensor, num_expert: int, world_size: int = 1
) -> Tensor:
    """index with -1 for all choices of an expert after its first capacity[expert], in flattened order."""
    left, kept = capacity.tolist(), index.reshape(-1).tolist()
    for place, expert in enumerate(kept):
        if expert >= 0:
            left[expert] -= 1
            kept[place] = expert if left[expert] >= 0 else -1
    return torch.tensor(kept, dtype=index.dtype, device=index.device).view_as(index)


def limit_by_capacity(
    counts: Tensor, capacity: Tensor, num_expert: int, world_size: int = 1
) -> Tensor:
    return torch.minimum(counts, capacity.to(counts.dtype))


def mark_module_parallel_comm(module: nn.Module, comm: str) -> None:
    for parameter in module.parameters():
        parameter.dp_comm = comm  # type: ignore[attr-defined]


# Names that the published code imports, by module.
MODULES: dict[str, dict[str, Any]] = {
    "fmoe": {},
    "fmoe.transformer": {"_Expert": _Expert},
    "fmoe.layers": {
        "_fmoe_general_global_forward": route,
        "mark_module_parallel_comm": mark_module_parallel_comm,
    },
    "fmoe.functions": {"count_by_gate": count_by_gate},
    "fmoe.gates": {"NaiveGate": NaiveGate, "NoisyGate": NoisyGate},
    "fmoe_cuda": {
        "prune_gate_by_capacity": prune_gate_by_capacity,
        "limit_by_capacity": limit_by_capacity,
    },
}
