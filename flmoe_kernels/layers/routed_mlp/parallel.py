"""Experts on several processes: rows travel to their experts' process and back (torch.distributed).

Rank r of a group of R holds the experts r * local to (r + 1) * local - 1 and any number of tokens, also none:

    dispatch        rows sorted by expert, hence by rank; dropped rows stay behind
    counts          one all_to_all_single of local + 5 integers per pair of ranks, then one wait of the host
    rows            all_to_all_single of uneven splits
    experts         the routed MLP with K = 1 and weight 1; which expert a row is for follows from the counts
    rows back       the reversed exchange
    combine         weighted and added in the order of k, where the token lives

An expert sees its rows in the order of ranks, then of tokens, and a token's rows are added in the order of k: a
result is that of one process which holds all tokens in the order of ranks, up to the order in which the matrix
products add. The wait is inherent: an uneven exchange needs the sizes on the host. A gate with a capacity waits
once more, for the number of all ranks' tokens. All else is queued.

What every rank has to do: run the same calls in the same order, forward and backward; a rank without tokens
too, and one whose objective has no use for the output (then add `out.sum() * 0`). Ranks need not agree on which
inputs require gradients, they tell one another; that one records gradients while another does not is an error
on all of them. A gate's loss has to enter the objective on every rank or on none: its sum over the ranks is a
collective, whose backward is one too. An error that one rank alone can see (an index out of range) leaves the
others waiting until the group's own timeout.

A training program, in train.py, started with `torchrun --nproc-per-node 4 train.py`:

    dist.init_process_group("nccl")                           # on the CPU "gloo"
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.manual_seed(rank)                                   # experts of their own on every rank
    layer = RoutedMLP(4, 256, 512, gate="GShardGate", world_size=dist.get_world_size())
    model = nn.Sequential(nn.Linear(64, 256), layer, nn.Linear(256, 20)).to(device)
    prepare_for_ddp(model)                                    # DDP leaves the experts alone
    model = DistributedDataParallel(model)                    # and makes all else equal, rank 0's
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, target in batches(rank):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target) + 0.01 * layer.gate_loss()
        loss.backward()
        optimizer.step()

Each rank saves its own experts: their names are the same on every rank, their values are not. The norm for
gradient clipping has to count the experts of all ranks, which clip_grad_norm_ does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import dtype_code, statistics_dtype
from flmoe_kernels.ops.routed_mlp.api import routed_mlp, validate
from flmoe_kernels.ops.routed_mlp.reference import ACTIVATIONS
from flmoe_kernels.ops.routing.api import dispatch

from .collectives import ranks_of


def parallel_routed_mlp(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    act: str = "gelu",
    group: Any = None,
    mean_gradients: bool = False,
    backend: str | None = None,
) -> Tensor:
    """routed_mlp with the experts spread over the ranks of a group, `local` on each; all of them call it.

    Args:
        x: (N, D) this rank's tokens, N of its own, from 0.
        index: (N, K) int64 or int32, experts from 0 to E - 1 = ranks * local - 1, or -1 = dropped, not sent.
        weight: (N, K), same dtype as x.
        w_in, b_in: (local, F, D) and (local, F) or None: this rank's experts.
        w_out, b_out: (local, D, F) and (local, D) or None.
        act: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        group: the process group; None for the default one. Its backend must know the tensors' device: gloo the
            CPU, NCCL the GPU.
        mean_gradients: the gradients of this rank's experts are those of the sum of all ranks' objectives;
            True divides them by the number of ranks, as DistributedDataParallel does with all others, so that
            both are of the mean.
        backend: of routing and of the MLP, as in routed_mlp.

    Returns:
        out (N, D). Differentiable by x, weight, weights and biases; x and weight get the gradients of the sum of
        all ranks' objectives. In half precision a row is rounded where it leaves its expert, once more than in
        one process.

    Raises:
        TypeError, ValueError, BackendUnavailable: as routed_mlp. ValueError on every rank where ranks differ in
            the width or the dtype of x, or in whether they record gradients. A different number of experts on
            another rank cannot be told here: the sizes of the very first message depend on it.

    Cost: a rank sends and receives D values per kept row twice forward and twice backward; memory O(N K D) here
    and O(R (D + F)) for the R rows received.
    """
    ranks = ranks_of(group)
    validate(x, weight, w_in, b_in, w_out, b_out)
    check.require_tensor("index", index)
    check.require_shape("index", index, tuple(weight.shape), "(N, K)")
    if index.device != x.device:
        raise ValueError(f"index: expected device {x.device} as x, got {index.device}")
    check.require_choice("act", act, tuple(ACTIVATIONS))
    counts, _, permutation = dispatch(index, ranks * w_in.shape[0], backend=backend)
    parameters: tuple[Tensor | None, ...] = (w_in, b_in, w_out, b_out)
    if mean_gradients:
        parameters = tuple(_divide_gradient(p, ranks) for p in parameters)
    plan = _agree(counts.view(ranks, -1), x, parameters, group)
    order = permutation[: sum(plan.send)].long()
    places = _inverse(permutation, len(order))
    rows = _Take.apply(x, order, places, weight.shape[1])
    rows = _exchange(rows, plan.send, plan.receive, group, plan.rows_on_graph)
    ones = rows.new_ones((len(rows), 1))
    rows = routed_mlp(rows, plan.expert, ones, *parameters, act=act, backend=backend)  # type: ignore[arg-type]
    rows = _exchange(rows, plan.receive, plan.send, group, plan.outputs_on_graph)
    rows = _Place.apply(rows, order, places)
    return _combine(rows.view(*weight.shape, x.shape[1]), weight, index)


class _Plan(NamedTuple):
    """What a call exchanges: rows to and from each rank, each received row's expert here as an index (rows, 1),
    and whether the exchanges of rows and of outputs have a backward, which they have on all ranks or on none."""

    send: list[int]
    receive: list[int]
    expert: Tensor
    rows_on_graph: bool
    outputs_on_graph: bool


def _agree(counts: Tensor, x: Tensor, parameters: tuple[Tensor | None, ...], group: Any) -> _Plan:
    """Tell every rank how many rows each of its experts gets from here (counts: (ranks, local)), and what has to
    be the same on all."""
    ranks, local = counts.shape
    records = torch.is_grad_enabled()
    rows_need = records and x.requires_grad
    outputs_need = rows_need or (
        records and any(p is not None and p.requires_grad for p in parameters)
    )
    note = torch.tensor(
        [x.shape[1], dtype_code(x), records, rows_need, outputs_need], device=x.device
    )
    mine = torch.cat([counts.long(), note.expand(ranks, -1)], dim=1)
    theirs = torch.empty_like(mine)
    dist.all_to_all_single(theirs, mine, group=group)
    incoming = theirs[:, :local]
    sizes = torch.stack([counts.sum(dim=1), incoming.sum(dim=1)], dim=1)
    # The one wait of the host.
    table = torch.cat([sizes, theirs[:, local:]], dim=1).tolist()
    send, receive, widths, dtypes, recording, rows, outputs = map(list, zip(*table, strict=True))
    if len(set(widths)) > 1:
        raise ValueError(f"x: expected the same width on all ranks, got {widths}")
    if len(set(dtypes)) > 1:
        raise ValueError(f"x: expected the same dtype on all ranks, got {x.dtype} and others")
    if len(set(recording)) > 1:
        without = [rank for rank, flag in enumerate(recording) if not flag]
        raise ValueError(
            f"group: expected gradients to be recorded on all ranks or on none, got ranks {without} without"
        )
    own = torch.arange(local, device=x.device).repeat(ranks)
    expert = own.repeat_interleave(incoming.reshape(-1), output_size=sum(receive))
    return _Plan(send, receive, expert.unsqueeze(1), any(rows), any(outputs))


def _inverse(permutation: Tensor, kept: int) -> Tensor:
    """Where each of the N * K choices is among the kept rows; `kept` for a dropped one."""
    place = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(place).scatter_(0, permutation.long(), place).clamp_(max=kept)


def _exchange(
    rows: Tensor, send: list[int], receive: list[int], group: Any, on_graph: bool
) -> Tensor:
    # A rank whose rows need no gradient has to pass those of the others on: the anchor puts it on the graph.
    anchor = rows.new_empty((0,)).requires_grad_() if on_graph else None
    return _Exchange.apply(rows, anchor, send, receive, group)


def _combine(rows: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """out (N, D): rows (N, K, D) weighted and added in the order of k, in the type that sums are kept in."""
    wide = statistics_dtype(rows.dtype)
    # A dropped choice adds nothing, whatever its weight is.
    weights = weight.masked_fill(index < 0, 0.0).to(wide).unsqueeze(2).unbind(1)
    first, *rest = rows.to(wide).unbind(1)
    out = first * weights[0]
    for row, share in zip(rest, weights[1:], strict=True):
        out = torch.addcmul(out, row, share)
    return out.to(rows.dtype)


def _divide_gradient(parameter: Tensor | None, ranks: int) -> Tensor | None:
    if parameter is None or not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter
    view = parameter.view_as(parameter)
    view.register_hook(lambda grad: grad / ranks)
    return view


class _Exchange(torch.autograd.Function):
    """rows (sum of send, D), sorted by rank -> (sum of receive, D); backward the other way round."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        anchor: Tensor | None,
        send: list[int],
        receive: list[int],
        group: Any,
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty((sum(receive), rows.shape[1]))
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Exchanged also where nobody here wants it: the other ranks wait for it.
        on_graph = torch.is_grad_enabled()
        back = _exchange(grad, ctx.receive, ctx.send, ctx.group, on_graph)
        return back, None, None, None, None


class _Take(torch.autograd.Function):
    """z (M, D) -> y with y[i] = z[order[i] // choices]; places (M * choices) is the inverse of order.

    Its backward gathers as well: no atomics, one result for every run.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, order: Tensor, places: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order, places)
        ctx.sizes = (z.shape[0], choices, z.shape[1])
        return z.index_select(0, order if choices == 1 else order // choices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        placed = _Place.apply(grad, *ctx.saved_tensors).view(ctx.sizes)
        return placed.sum(dim=1), None, None, None


class _Place(torch.autograd.Function):
    """y -> z with z[order[i]] = y[i], and 0 where places is len(y): the transposed map of _Take."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        padded = y if len(y) == len(places) else F.pad(y, (0, 0, 0, 1))
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Take.apply(grad, *ctx.saved_tensors, 1), None, None
