"""Gates: which experts a token goes to, with what weight, and the loss that keeps the experts' loads even.

Constructors, parameters and the loss's handling are FastMoE's (arXiv 2103.13262), so that checkpoints load; what
they compute is written anew. Every loss has a gradient, drops are deterministic, and a masked token neither
takes capacity nor counts in a loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation as check
from .api import ALL, SELECTED, Routing
from .api import gate as choose


class Gate(nn.Module):
    """What all gates have in common.

    Args:
        d_model: token width D.
        num_expert, world_size: experts of one process, and processes; E = num_expert * world_size.
        top_k: experts of a token.

    Attributes:
        loss: of the last call, until taken with get_loss; None before.
    """

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int) -> None:
        super().__init__()
        check.require_count("d_model", d_model, 1)
        check.require_count("num_expert", num_expert, 1)
        check.require_count("world_size", world_size, 1)
        self.num_expert, self.world_size = num_expert, world_size
        self.tot_expert = num_expert * world_size
        check.require_count("top_k", top_k, 1, self.tot_expert)
        self.top_k = top_k
        self.loss: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route x (N, D); mask (N) bool, True = valid.

        Returns:
            Routing: index (N, K), -1 for a dropped choice, and weight (N, K).
        """
        raise NotImplementedError

    def set_loss(self, loss: Tensor) -> None:
        self.loss = loss

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """The last call's loss, a scalar; by default it is forgotten."""
        loss = self.loss
        if clear:
            self.loss = None
        return loss

    @property
    def has_loss(self) -> bool:
        return self.loss is not None

    def extra_repr(self) -> str:
        return f"experts={self.tot_expert}, top_k={self.top_k}"


class NaiveGate(Gate):
    """The top_k largest of a linear map, softmax over them. Its loss is 0.

    Parameters: gate.weight (E, D), gate.bias (E).
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k)
        self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        logits = self.gate(x)
        # Zero, but on the graph: a sum of losses has a gradient whatever the gates are.
        self.set_loss(logits.sum() * 0.0)
        return choose(logits, self.top_k, mask=mask)


class _CapacityGate(NaiveGate):
    """A gate whose experts take a bounded number of rows.

    capacity: rates for training and evaluation; an expert takes rate * K / E of all N rows, rounded up. N counts
    masked rows too: how many are valid is data, and nothing waits for it.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int,
        capacity: tuple[float, float],
        gate_bias: bool,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        for rate in capacity:
            check.require_positive("capacity", rate)
        self.capacity = tuple(capacity)

    def rows_per_expert(self, tokens: int) -> int:
        rate = self.capacity[0 if self.training else 1]
        return math.ceil(rate * tokens * self.top_k / self.tot_expert)

    def balance(self, first: Tensor, probabilities: Tensor, mask: Tensor | None) -> Tensor:
        """E * sum over experts of (share of tokens whose first choice it is) * (mean probability); 1 when even."""
        wide = probabilities.float()
        chosen = F.one_hot(first, self.tot_expert).to(wide.dtype)
        if mask is None:
            return self.tot_expert * (chosen.mean(dim=0) * wide.mean(dim=0)).sum()
        valid = mask.to(wide.dtype)
        count = valid.sum().clamp(min=1.0)
        shares, means = (valid @ chosen) / count, (valid @ wide) / count
        return self.tot_expert * (shares * means).sum()


class GShardGate(_CapacityGate):
    """Top-2 with a capacity and a balance loss (arXiv 2006.16668).

    random_routing: in training the second expert is taken with probability 2 * its weight only. The weight of a
    choice beyond the capacity goes to the token's other one.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        capacity: tuple[float, float] = (1.2, 2.4),
        random_routing: bool = False,
        gate_bias: bool = True,
    ) -> None:
        if top_k != 2:
            raise ValueError(f"top_k: expected 2 for GShard, got {top_k}")
        super().__init__(d_model, num_expert, world_size, 2, capacity, gate_bias)
        self.random_routing = random_routing

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        logits = self.gate(x)
        free = choose(logits, 2)
        self.set_loss(self.balance(free.index[:, 0], logits.float().softmax(dim=1), mask))
        index, weight = choose(logits, 2, capacity=self.rows_per_expert(len(x)), mask=mask)
        if self.random_routing and self.training:
            draw = torch.rand(len(x), device=x.device, dtype=torch.float32)
            dropped = 2 * free.weight[:, 1].float() < draw
            second = torch.stack([torch.zeros_like(dropped), dropped], dim=1)
            index = index.masked_fill(second, -1)
            weight = weight.masked_fill(second, 0.0)
        return Routing(index, weight)


class SwitchGate(_CapacityGate):
    """Top-1 with a capacity, jitter and a balance loss (arXiv 2101.03961).

    In training the router sees its input multiplied with noise from 1 - switch_eps to 1 + switch_eps. The weight
    is the expert's probability among all.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] = (1.2, 2.4),
        gate_bias: bool = True,
    ) -> None:
        if top_k != 1:
            raise ValueError(f"top_k: expected 1 for Switch, got {top_k}")
        super().__init__(d_model, num_expert, world_size, 1, capacity, gate_bias)
        check.require_probability("switch_eps", switch_eps)
        self.switch_eps = switch_eps

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        if self.training and self.switch_eps > 0:
            x = x * (1.0 + self.switch_eps * (2.0 * torch.rand_like(x) - 1.0))
        logits = self.gate(x)
        first = choose(logits, 1, over=ALL).index[:, 0]
        self.set_loss(self.balance(first, logits.float().softmax(dim=1), mask))
        return choose(logits, 1, over=ALL, capacity=self.rows_per_expert(len(x)), mask=mask)


class NoisyGate(Gate):
    """Noisy top-k with losses on importance and load (arXiv 1701.06538).

    In training normal noise of a learned deviation is added to the logits; the loss is the squared coefficient of
    variation of the experts' importance (summed weights) plus that of their load (expected number of tokens).

    Parameters: w_gate, w_noise (D, E).
    """

    noise_epsilon = 1e-2

    def __init__(self, d_model: int, num_expert: int, world_size: int = 1, top_k: int = 2) -> None:
        super().__init__(d_model, num_expert, world_size, top_k)
        self.w_gate = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.w_gate, self.w_noise):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        clean = x @ self.w_gate
        deviation, noisy = None, clean
        if self.training:
            deviation = F.softplus(x @ self.w_noise) + self.noise_epsilon
            noisy = clean + torch.randn_like(clean) * deviation
        index, weight = choose(noisy, self.top_k, over=SELECTED, mask=mask)
        chosen = index.clamp(min=0)
        importance = torch.zeros_like(noisy).scatter_add(1, chosen, weight).float()
        load = self._load(clean, noisy, deviation, index, mask)
        self.set_loss(variation(importance.sum(dim=0)) + variation(load.sum(dim=0)))
        return Routing(index, weight)

    def _load(
        self,
        clean: Tensor,
        noisy: Tensor,
        deviation: Tensor | None,
        index: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """(N, E): the probability that other noise of the expert would leave it among the top_k."""
        if deviation is None or self.top_k == self.tot_expert:
            counts = torch.zeros_like(noisy, dtype=torch.float32)
            return counts.scatter_add(1, index.clamp(min=0), (index >= 0).float())
        best = noisy.float().topk(self.top_k + 1, dim=1).values
        inside, outside = best[:, -1:], best[:, -2:-1]
        # An expert that is in has to beat the first one that is out, and the other way round.
        rival = torch.where(noisy.float() > inside, inside, outside)
        probability = torch.special.ndtr((clean.float() - rival) / deviation.float())
        return probability if mask is None else probability * mask.unsqueeze(1)


def variation(x: Tensor) -> Tensor:
    """The squared coefficient of variation of x (E): 0 when all are equal, and for one expert."""
    if x.numel() < 2:
        return x.sum() * 0.0
    x = x.float()
    return x.var() / (x.mean().square() + 1e-10)


GATES: dict[str, Any] = {
    gate.__name__: gate for gate in (NaiveGate, GShardGate, SwitchGate, NoisyGate)
}
