"""Gates: choice and weights of a token's experts, load-balancing losses.

Constructors, parameters and hooks are those of FastMoE (arXiv 2103.13262) and of FL-I2MoE's lineage, so that
checkpoints load; the computations are a new implementation. Every loss has a gradient and counts every call, drops
are deterministic, and a masked token neither uses capacity nor counts in a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.ops.routing.api import ALL, SELECTED, Routing, limit, reweigh
from flmoe_kernels.ops.routing.api import gate as choose

from .collectives import limit_over_ranks, sum_over_ranks, tokens_over_ranks
from .gate_base import Gate as Gate


class NaiveGate(Gate):
    """Top-k of a linear map with a softmax over the chosen experts. The loss is 0.

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

    def clean_logits(self, x: Tensor) -> Tensor:
        return self._for_all_experts(self.gate(x))

    def route(self, x: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.clean_logits(x)
        index, weight = choose(logits, self.top_k, mask=mask, backend=self.backend)
        # Zero, but with a graph, so that a sum of losses has a gradient for any gates. Not 0 times the logits,
        # whose sum may overflow.
        return index, weight, logits[:0].sum()

    @property
    def may_drop(self) -> bool:
        return type(self).route is not NaiveGate.route


class _CapacityGate(NaiveGate):
    """A gate with a maximum number of rows per expert.

    capacity: rates for training and evaluation; an expert takes at most rate * tokens * K / E rows, rounded up.
    Masked tokens count as tokens, because counting the valid tokens would synchronize with the device.
    """

    CHOICES: int  # the gate's fixed top_k

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
        if self.top_k != self.CHOICES:
            raise ValueError(
                f"top_k: expected {self.CHOICES} for {type(self).__name__}, got {self.top_k}"
            )
        return math.ceil(self._rate * tokens * self.top_k / self.tot_expert)

    @property
    def may_drop(self) -> bool:
        return self._rate * self.top_k < self.tot_expert

    @property
    def _rate(self) -> float:
        return self.capacity[0 if self.training else 1]

    def limited(
        self,
        logits: Tensor,
        free: Routing,
        mask: Tensor | None,
        tokens: int,
        renormalize: bool,
    ) -> Routing:
        """Keep those choices in `free` that belong to valid tokens and fit the capacity; logits (N, E)."""
        experts, backend = self.tot_expert, self.backend
        if self.spread:
            rows = self.rows_per_expert(tokens_over_ranks(tokens, free.index.device, self.group))
            index = limit_over_ranks(free.index, mask, experts, rows, self.group, backend=backend)
        else:
            rows = self.rows_per_expert(tokens)
            index = limit(free.index, experts, capacity=rows, mask=mask, backend=backend)
        return Routing(index, reweigh(logits, free, index, renormalize))

    def balance(self, first: Tensor, probabilities: Tensor, mask: Tensor | None) -> Tensor:
        """E * sum over experts of (share of tokens with it as first choice) * (mean probability); 1 if even."""
        # Not one_hot, which reads values and so does not run under vmap.
        experts = torch.arange(self.tot_expert, device=first.device)
        chosen = (first[:, None] == experts).to(probabilities.dtype)
        valid = torch.ones_like(first, dtype=torch.bool) if mask is None else mask
        # No matrix products: autocast would compute them in half precision, where token counts overflow.
        counted = [chosen, probabilities, torch.ones_like(chosen)]
        sums = torch.stack([torch.where(valid[:, None], x, 0.0).sum(dim=0) for x in counted])
        if self.spread:
            sums = sum_over_ranks(sums, self.group)
        shares, means = sums[:2] / sums[2].clamp(min=1.0)
        return self.tot_expert * (shares * means).sum()


class GShardGate(_CapacityGate):
    """Top-2 with a capacity and a balance loss (arXiv 2006.16668).

    random_routing: in training the second expert is used only with probability 2 * its weight; otherwise its
    weight is lost, as published. The weight of a choice beyond the capacity goes to the token's other choice.
    """

    CHOICES = 2

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        topk: int = 2,
        capacity: tuple[float, float] = (1.2, 2.4),
        random_routing: bool = False,
        gate_bias: bool = True,
    ) -> None:
        if topk != 2:
            raise ValueError(f"topk: expected 2 for GShard, got {topk}")
        super().__init__(d_model, num_expert, world_size, 2, capacity, gate_bias)
        self.random_routing = random_routing

    def route(self, x: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.clean_logits(x)
        free = choose(logits, 2, backend=self.backend)
        loss = self.balance(free.index[:, 0], _probabilities(logits), mask)
        index, weight = self.limited(logits, free, mask, tokens, renormalize=True)
        if self.random_routing and self.training:
            draw = torch.rand(x.shape[0], device=x.device, dtype=torch.float32)
            dropped = 2 * free.weight[:, 1].float() < draw
            second = torch.stack([torch.zeros_like(dropped), dropped], dim=1)
            index = index.masked_fill(second, -1)
            weight = weight.masked_fill(second, 0.0)
        return index, weight, loss


class SwitchGate(_CapacityGate):
    """Top-1 with a capacity, jitter and a balance loss (arXiv 2101.03961).

    In training the router's input is multiplied by noise from 1 - switch_eps to 1 + switch_eps. The weight is the
    expert's probability in a softmax over all experts.
    """

    CHOICES = 1

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        topk: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] = (1.2, 2.4),
        gate_bias: bool = True,
    ) -> None:
        if topk != 1:
            raise ValueError(f"topk: expected 1 for Switch, got {topk}")
        super().__init__(d_model, num_expert, world_size, 1, capacity, gate_bias)
        check.require_probability("switch_eps", switch_eps)
        self.switch_eps = switch_eps

    def route(self, x: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.training and self.switch_eps > 0:
            x = x * (1.0 + self.switch_eps * (2.0 * torch.rand_like(x) - 1.0))
        logits = self.clean_logits(x)
        free = choose(logits, 1, over=ALL, backend=self.backend)
        loss = self.balance(free.index[:, 0], _probabilities(logits), mask)
        index, weight = self.limited(logits, free, mask, tokens, renormalize=False)
        return index, weight, loss


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(statistics_dtype(logits.dtype)).softmax(dim=1)


class NoisyGate(Gate):
    """Noisy top-k with losses on importance and load (arXiv 1701.06538).

    In training, normal noise with a learned deviation is added to the logits. The loss is the squared coefficient
    of variation of the experts' importance (summed weights) plus that of their load (expected number of tokens).

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

    def clean_logits(self, x: Tensor) -> Tensor:
        return self._for_all_experts(x @ self.w_gate)

    def route(self, x: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        clean = self.clean_logits(x)
        deviation, noisy = None, clean
        if self.training:
            deviation = F.softplus(x @ self.w_noise) + self.noise_epsilon
            noisy = clean + torch.randn_like(clean) * deviation
        index, weight = choose(noisy, self.top_k, over=SELECTED, mask=mask, backend=self.backend)
        wide = statistics_dtype(noisy.dtype)
        none = torch.zeros_like(noisy, dtype=wide)
        importance = none.scatter_add(1, index.clamp(min=0), weight.to(wide))
        load = self._load(clean.to(wide), noisy.to(wide), deviation, index, mask)
        sums = torch.stack([importance.sum(dim=0), load.sum(dim=0)])
        if self.spread:
            sums = sum_over_ranks(sums, self.group)
        return index, weight, variation(sums[0]) + variation(sums[1])

    @property
    def may_drop(self) -> bool:
        return type(self).route is not NoisyGate.route

    def _load(
        self,
        clean: Tensor,
        noisy: Tensor,
        deviation: Tensor | None,
        index: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Probability (N, E) that an expert would be among the top_k if only its noise were drawn again."""
        if deviation is None or self.top_k == self.tot_expert:
            counts = torch.zeros_like(noisy)
            return counts.scatter_add(1, index.clamp(min=0), (index >= 0).to(noisy.dtype))
        best = noisy.topk(self.top_k + 1, dim=1).values
        inside, outside = best[:, -1:], best[:, -2:-1]
        # A chosen expert has to beat the best unchosen expert; an unchosen expert the worst chosen expert.
        rival = torch.where(noisy > inside, inside, outside)
        probability = torch.special.ndtr((clean - rival) / deviation.to(clean.dtype))
        return probability if mask is None else probability * mask.unsqueeze(1)


def variation(x: Tensor) -> Tensor:
    """The squared coefficient of variation of x (E); 0 if all values are equal, or for a single expert."""
    if x.numel() < 2:
        return x[:0].sum()
    return x.var() / (x.mean().square() + 1e-10)


GATES: dict[str, type[Gate]] = {
    gate.__name__: gate for gate in (NaiveGate, GShardGate, SwitchGate, NoisyGate)
}
# The name of NoisyGate's copy in FL-I2MoE's lineage.
LINEAGE_NAMES: dict[str, type[Gate]] = {"AddtionalNoisyGate": NoisyGate}


def gate_class(gate: str | type[Gate] | Callable[..., Gate]) -> Callable[..., Gate]:
    """A function of (d_model, num_expert, world_size, top_k) that returns a gate, of a name, class or function."""
    if isinstance(gate, str):
        known = GATES | LINEAGE_NAMES
        if gate not in known:
            raise ValueError(f"gate: expected one of {', '.join(known)}, got {gate!r}")
        return known[gate]
    if not callable(gate) or (isinstance(gate, type) and not issubclass(gate, Gate)):
        name = gate.__qualname__ if isinstance(gate, type) else type(gate).__name__
        raise TypeError(f"gate: expected a name, a Gate class or a function, got {name}")

    def made(*sizes: int) -> Gate:
        result = gate(*sizes)
        if not isinstance(result, Gate):
            raise TypeError(f"gate: expected to return a Gate, got {type(result).__name__}")
        return result

    return made
