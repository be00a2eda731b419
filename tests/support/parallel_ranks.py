"""Processes of test_routed_parallel: each rank's part, and a single process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from flmoe_kernels.layers.routed_mlp.collectives import limit_over_ranks
from flmoe_kernels.layers.routed_mlp.ddp import prepare_for_ddp
from flmoe_kernels.layers.routed_mlp.gates import GShardGate, SwitchGate
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.layers.routed_mlp.parallel import parallel_routed_mlp
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import limit
from tests.support.inputs import draw

LOCAL, WIDTH, HIDDEN, CHOICES = 3, 5, 7, 2
NAMES = ("x", "weight", "w_in", "b_in", "w_out", "b_out")
# Tokens per rank: in total more than half precision can count.
BALANCED = (700, 0, 41, 300)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call. load: "even"; "hot" for all rows to the last rank; "gaps" for experts without rows; "dropped" for a
    shared capacity and masks; "none" for rows without experts. needs: inputs that require gradients on a rank,
    None for no_grad."""

    tokens: tuple[int, ...] = (9, 6, 7, 8)
    load: str = "even"
    dtype: torch.dtype = torch.float64
    backend: str | None = None
    needs: Callable[[int], tuple[str, ...] | None] = lambda rank: NAMES

    def starts(self, ranks: int) -> list[int]:
        return [sum(self.tokens[:r]) for r in range(ranks + 1)]

    def index(self, ranks: int) -> Tensor:
        tokens, experts = sum(self.tokens[:ranks]), LOCAL * ranks
        logits = draw(tokens, experts, seed=1)
        if self.load == "hot":
            logits[:, -LOCAL:] += 100.0
        if self.load == "gaps":
            logits[:, ::LOCAL] -= 100.0
        index = logits.argsort(dim=1, descending=True)[:, :CHOICES]
        if self.load == "dropped":
            index[: tokens // 2, 0] = experts - 1
            return limit(index, experts, capacity=self.capacity(ranks), mask=self.mask(ranks))
        return torch.full_like(index, -1) if self.load == "none" else index

    def mask(self, ranks: int) -> Tensor:
        return torch.arange(sum(self.tokens[:ranks])) % 5 != 1

    def capacity(self, ranks: int) -> int:
        return 1 + sum(self.tokens[:ranks]) // (2 * ranks)

    def inputs(self, ranks: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        tokens, experts = sum(self.tokens[:ranks]), LOCAL * ranks
        shapes = {
            "x": (tokens, WIDTH),
            "weight": (tokens, CHOICES),
            "w_in": (experts, HIDDEN, WIDTH),
            "b_in": (experts, HIDDEN),
            "w_out": (experts, WIDTH, HIDDEN),
            "b_out": (experts, WIDTH),
        }
        made = {
            n: draw(*s, dtype=self.dtype, seed=10 + i) for i, (n, s) in enumerate(shapes.items())
        }
        return {name: x.to(dtype or self.dtype) for name, x in made.items()}

    def cotangent(self, ranks: int) -> Tensor:
        # Values that all dtypes represent exactly.
        return draw(sum(self.tokens[:ranks]), WIDTH, dtype=torch.bfloat16, seed=5)

    def slice(self, name: str, x: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's part of the tensors of tokens or experts."""
        starts = self.starts(ranks)
        if name in ("x", "weight", "out", "index", "mask"):
            return x[starts[rank] : starts[rank + 1]]
        return x[rank * LOCAL : (rank + 1) * LOCAL]


def some_need(rank: int) -> tuple[str, ...]:
    """x is data on the first rank, experts are frozen on the second, only `weight` has a gradient on the third."""
    return (NAMES[1:], ("x", "weight"), ("weight",), NAMES)[rank]


CASES = {
    "even": Case(),
    "reference": Case(backend="reference"),
    "a rank without tokens": Case((5, 0, 3, 11)),
    "tokens on one rank alone": Case((0, 13, 0, 0)),
    "no tokens": Case((0, 0, 0, 0)),
    "all rows to one rank": Case(load="hot"),
    "experts without rows": Case(load="gaps"),
    "drops and masks": Case((7, 9, 0, 4), load="dropped"),
    "all dropped": Case(load="none"),
    "float32": Case((40, 1, 23, 30), dtype=torch.float32),
    "bfloat16": Case((40, 1, 23, 30), dtype=torch.bfloat16),
    "float16": Case((40, 0, 23, 30), load="dropped", dtype=torch.float16),
    "frozen experts": Case(needs=lambda rank: NAMES[:2]),
    "other needs on each rank": Case((4, 0, 6, 3), needs=some_need),
    "no gradients": Case(needs=lambda rank: None),
}


def evaluate(
    call: Callable[..., Tensor], inputs: dict[str, Tensor], cotangent: Tensor, needs: Any
) -> dict[str, Tensor]:
    """out, and the requested gradients."""
    leaves = {n: x.clone().requires_grad_(n in (needs or ())) for n, x in inputs.items()}
    with torch.set_grad_enabled(needs is not None):
        out = call(*leaves.values())
        if out.requires_grad:
            (out * cotangent.to(out.dtype)).sum().backward()
    grads = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return {"out": out.detach(), **grads}


def part(case: Case, rank: int, ranks: int) -> dict[str, Tensor]:
    inputs = {n: case.slice(n, x, rank, ranks) for n, x in case.inputs(ranks).items()}
    index = case.slice("index", case.index(ranks), rank, ranks)

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return parallel_routed_mlp(x, index, *rest, act="silu", backend=case.backend)

    cotangent = case.slice("out", case.cotangent(ranks), rank, ranks)
    return evaluate(call, inputs, cotangent, case.needs(rank))


def whole(case: Case, ranks: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Oracle: all tokens and experts in one process, by the reference."""

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return routed_mlp(x, case.index(ranks), *rest, act="silu", backend="reference")

    return evaluate(call, case.inputs(ranks, dtype), case.cotangent(ranks), NAMES)


def balance(rank: int, ranks: int) -> dict[str, Tensor]:
    """Loss of a gate under autocast, and the logits of its choice."""
    tokens = sum(BALANCED[:rank]), sum(BALANCED[: rank + 1])
    torch.manual_seed(4)
    gate = SwitchGate(WIDTH, LOCAL * ranks, switch_eps=0.0, capacity=(99.0, 99.0))
    gate.spread = True
    x = draw(sum(BALANCED[:ranks]), WIDTH, seed=6)[slice(*tokens)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate(x)
        logits = gate.clean_logits(x)
    loss = gate.get_loss()
    return {"loss": loss.detach(), "logits": logits.detach()}


LIMITED = Case((5, 4, 0, 11))


def limited(ranks: int) -> tuple[Tensor, Tensor]:
    """Choices, some of which are already dropped, and a mask."""
    index = LIMITED.index(ranks)
    index[::4, 1] = -1
    return index, LIMITED.mask(ranks)


# Capacities of 0, some and more than all rows; with and without a mask.
LIMITS = [(capacity, masked) for capacity in (0, 1, 3, 100) for masked in (False, True)]


def limits(rank: int, ranks: int) -> list[Tensor]:
    mine, valid = (LIMITED.slice("index", x, rank, ranks) for x in limited(ranks))
    return [
        limit_over_ranks(mine, valid if masked else None, LOCAL * ranks, capacity)
        for capacity, masked in LIMITS
    ]


def expected_limits(ranks: int) -> list[Tensor]:
    index, mask = limited(ranks)
    options = {"backend": "reference"}
    return [
        limit(index, LOCAL * ranks, capacity=capacity, mask=mask if masked else None, **options)
        for capacity, masked in LIMITS
    ]


def mistakes(rank: int, ranks: int) -> dict[str, str]:
    """Error messages on each rank."""
    case = CASES["even"]
    inputs = {n: case.slice(n, x, rank, ranks) for n, x in case.inputs(ranks).items()}
    index = case.slice("index", case.index(ranks), rank, ranks)
    wide = 1 if rank else 0

    def call(index: Tensor = index, **other: Tensor) -> None:
        x, weight, *parameters = (inputs | other).values()
        parallel_routed_mlp(x, index, weight, *parameters)

    def recording() -> None:
        with torch.set_grad_enabled(rank == 0):
            call()

    attempts: dict[str, Callable[[], Any]] = {
        "width": lambda: call(
            x=inputs["x"].repeat(1, 1 + wide),
            w_in=inputs["w_in"].repeat(1, 1, 1 + wide),
            w_out=inputs["w_out"].repeat(1, 1 + wide, 1),
            b_out=inputs["b_out"].repeat(1, 1 + wide),
        ),
        "dtype": lambda: call(**{n: x.float() if wide else x for n, x in inputs.items()}),
        "recording": recording,
        "range": lambda: call(index=index + LOCAL * ranks),
        "module": lambda: RoutedMLP(LOCAL, WIDTH, HIDDEN, world_size=ranks + 1),
    }
    return {name: message_of(attempt) for name, attempt in attempts.items()}


def message_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "no error"


# Functions (d_model, num_expert, world_size, top_k) -> gate; only the last draws random numbers in training.
GATES: dict[str, Any] = {
    "NaiveGate": "NaiveGate",
    "GShardGate": lambda d, n, w, k: GShardGate(d, n, w, capacity=(0.7, 0.7)),
    "SwitchGate": lambda d, n, w, k: SwitchGate(d, n, w, switch_eps=0.0, capacity=(0.7, 0.7)),
    "NoisyGate": "NoisyGate",
}
TRAINING = Case((6, 9, 0, 4))
STEPS, RATE = 3, 0.02


class Network(nn.Module):
    """A RoutedMLP between layers that are the same on all ranks."""

    def __init__(self, gate: Any, experts: int, world_size: int = 1) -> None:
        super().__init__()
        self.below = nn.Linear(4, WIDTH)
        self.layer = RoutedMLP(experts, WIDTH, HIDDEN, gate=gate, world_size=world_size, top_k=2)
        self.above = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and the gate's loss."""
        out = self.above(self.layer(self.below(x), mask))
        return out, self.layer.gate_loss()


def network(name: str, ranks: int) -> Network:
    """The model with all experts in one process."""
    torch.manual_seed(3)
    made = Network(GATES[name], LOCAL * ranks).double()
    with torch.no_grad():
        for parameter in made.layer.experts.parameters():
            parameter.normal_()
    return made


def take(whole: nn.Module, mine: nn.Module, rank: int) -> None:
    """The parameters of a rank."""
    state = {
        n: p[rank * LOCAL : (rank + 1) * LOCAL] if ".experts." in n else p
        for n, p in whole.state_dict().items()
    }
    mine.load_state_dict(state)


def objective(out: Tensor) -> Tensor:
    return (out - 1.0).square().sum() / max(len(out), 1)


def steps(
    model: nn.Module, x: Tensor, mask: Tensor, noise: Tensor, loss: Callable[[Tensor], Tensor]
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with mock.patch.object(torch, "randn_like", return_value=noise):
            out, balance = model(x, mask)
        (loss(out) + 0.5 * balance).backward()
        optimizer.step()


def train_part(name: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """Parameters after some steps under DistributedDataParallel."""
    mine = Network(GATES[name], LOCAL, ranks).double()
    take(network(name, ranks), mine, rank)
    ignored = prepare_for_ddp(mine)
    assert sorted(ignored) == [
        f"layer.experts.{map}.{p}" for map in ("h4toh", "htoh4") for p in ("bias", "weight")
    ]
    model = nn.parallel.DistributedDataParallel(mine)
    x, mask, noise = (TRAINING.slice("x", t, rank, ranks) for t in batch(ranks))
    steps(model, x, mask, noise, objective)
    return {n: p.detach() for n, p in mine.named_parameters()}


def train_whole(name: str, ranks: int) -> dict[str, Tensor]:
    """Parameters after the same steps in one process, on the mean of the ranks' objectives."""
    model, (x, mask, noise) = network(name, ranks), batch(ranks)

    def mean(out: Tensor) -> Tensor:
        parts = [objective(TRAINING.slice("out", out, r, ranks)) for r in range(ranks)]
        return torch.stack(parts).sum() / ranks

    steps(model, x, mask, noise, mean)
    return {n: p.detach() for n, p in model.named_parameters()}


def batch(ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, mask, and NoisyGate's noise."""
    tokens = sum(TRAINING.tokens[:ranks])
    x = draw(tokens, 4, dtype=torch.float64, seed=8)
    return x, TRAINING.mask(ranks), draw(tokens, LOCAL * ranks, dtype=torch.float64, seed=9)


def every_result(rank: int, ranks: int) -> dict[str, Any]:
    """All results of a rank."""
    results: dict[str, Any] = {name: part(case, rank, ranks) for name, case in CASES.items()}
    for work in (balance, limits, mistakes):
        results[work.__name__] = work(rank, ranks)
    for name in GATES:
        results[f"train {name}"] = train_part(name, rank, ranks)
    return results
