"""Expert parallelism for the routed MLP (torch.distributed).

Rank r in a group of R ranks has the experts r * local to (r + 1) * local - 1 and any number of tokens, also 0:

    dispatch        sort rows by expert, hence by rank; dropped rows are not sent
    counts          one all_to_all_single of local + 5 integers per pair of ranks, then the host synchronizes once
    rows            all_to_all_single with uneven splits
    experts         the routed MLP with K = 1 and weight 1; the counts determine the expert of each row
    rows back       the reversed exchange
    combine         weight and add in the order of k, on the token's rank

An expert processes its rows in the order of ranks, then of tokens, and a token's rows are added in the order of k.
The result is that of one process with all tokens in the order of ranks, up to the order of summation in matrix
products. The synchronization is necessary, because an uneven exchange needs the sizes on the host. A gate with a
capacity synchronizes once more, for the number of tokens on all ranks. Everything else is asynchronous.

All ranks must make the same calls in the same order, forward and backward. This includes ranks without tokens, and
ranks whose objective does not use the output (add `out.sum() * 0` to it). Different inputs may require gradients
on different ranks, but it is an error on all ranks if only some of them record gradients. A gate's loss must be
part of the objective on all ranks or on none, because it is a sum over ranks, forward and backward. If only one
rank can detect an error (an index out of range), the other ranks wait until the group's timeout.

A training program, train.py, started with `torchrun --nproc-per-node 4 train.py`:

    dist.init_process_group("nccl")                           # on the CPU "gloo"
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.manual_seed(rank)                                   # different experts on every rank
    layer = RoutedMLP(4, 256, 512, gate="GShardGate", world_size=dist.get_world_size())
    model = nn.Sequential(nn.Linear(64, 256), layer, nn.Linear(256, 20)).to(device)
    prepare_for_ddp(model)                                    # DDP ignores the experts
    model = DistributedDataParallel(model)                    # and copies the rest from rank 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, target in batches(rank):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target) + 0.01 * layer.gate_loss()
        loss.backward()
        optimizer.step()

Each rank saves its own experts: their names are the same on all ranks, but their values differ. The norm for
gradient clipping must include the experts of all ranks; clip_grad_norm_ does not.
"""

from __future__ import annotations

from typing import Any

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
    """Compute routed_mlp with `local` experts on each rank of a group; all ranks must call it.

    Args:
        x: (N, D) this rank's tokens; N may differ between ranks and may be 0.
        index: (N, K) int64 or int32, experts from 0 to E - 1 = ranks * local - 1, or -1 = dropped, not sent.
        weight: (N, K), same dtype as x.
        w_in, b_in: (local, F, D) and (local, F) or None: this rank's experts.
        w_out, b_out: (local, D, F) and (local, D) or None.
        act: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        group: the process group; None for the default group. Its backend must support the tensors' device: gloo
            for the CPU, NCCL for the GPU.
        mean_gradients: if False, the gradients of this rank's experts are those of the sum of all ranks'
            objectives. True divides them by the number of ranks, as DistributedDataParallel does with all other
            gradients, so that all are those of the mean.
        backend: for routing and the MLP, as in routed_mlp.

    Returns:
        out (N, D). Differentiable with respect to x, weight, w_in, b_in, w_out and b_out; x and weight get the
        gradients of the sum of all ranks' objectives. In half precision a row is rounded when it leaves its
        expert, once more than in one process.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in routed_mlp. ValueError on every rank if ranks differ in
            the width or the dtype of x, or in whether they record gradients. A different number of experts on
            another rank cannot be detected, because the size of the first message depends on it.

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
    agreed = _agree(counts.view(ranks, -1), x, parameters, group)
    send, receive, expert, rows_on_graph, outputs_on_graph = agreed
    order = permutation[: sum(send)].long()
    places = _inverse(permutation, len(order))
    rows = _Take.apply(x, order, places, weight.shape[1])
    rows = _exchange(rows, send, receive, group, rows_on_graph)
    ones = rows.new_ones((len(rows), 1))
    rows = routed_mlp(rows, expert, ones, *parameters, act=act, backend=backend)  # type: ignore[arg-type]
    rows = _exchange(rows, receive, send, group, outputs_on_graph)
    rows = _Place.apply(rows, order, places)
    return _combine(rows.view(*weight.shape, x.shape[1]), weight, index)


def _agree(
    counts: Tensor, x: Tensor, parameters: tuple[Tensor | None, ...], group: Any
) -> tuple[list[int], list[int], Tensor, bool, bool]:
    """Send every rank the number of rows for each of its experts (counts: (ranks, local)), and the properties that
    must be the same on all ranks.

    Returns the rows to and from each rank, each received row's local expert as an index (rows, 1), and whether the
    exchanges of rows and of outputs have a backward, which is the same on all ranks.
    """
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
    # The host synchronizes only here.
    table = torch.cat([sizes, theirs[:, local:]], dim=1).tolist()
    send, receive, widths, dtypes, recording, rows, outputs = map(list, zip(*table, strict=True))
    if len(set(widths)) > 1:
        raise ValueError(f"x: expected the same width on all ranks, got {widths}")
    if len(set(dtypes)) > 1:
        raise ValueError(f"x: expected the same dtype on all ranks, got {x.dtype} and others")
    if len(set(recording)) > 1:
        without = [rank for rank, flag in enumerate(recording) if not flag]
        raise ValueError(
            f"group: expected gradients to be recorded on all ranks or on none, but not on ranks {without}"
        )
    own = torch.arange(local, device=x.device).repeat(ranks)
    expert = own.repeat_interleave(incoming.reshape(-1), output_size=sum(receive))
    return send, receive, expert.unsqueeze(1), any(rows), any(outputs)


def _inverse(permutation: Tensor, kept: int) -> Tensor:
    """Position of each of the N * K choices among the kept rows; `kept` for a dropped choice."""
    place = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(place).scatter_(0, permutation.long(), place).clamp_(max=kept)


def _exchange(
    rows: Tensor, send: list[int], receive: list[int], group: Any, on_graph: bool
) -> Tensor:
    # A rank whose rows need no gradient still has to take part in the backward; the anchor adds it to the graph.
    anchor = rows.new_empty((0,)).requires_grad_() if on_graph else None
    return _Exchange.apply(rows, anchor, send, receive, group)


def _combine(rows: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """out (N, D): rows (N, K, D) weighted and added in the order of k, in the statistics dtype."""
    wide = statistics_dtype(rows.dtype)
    # A dropped choice adds nothing, whatever its weight.
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
    """Exchange rows (sum of send, D), sorted by rank, for (sum of receive, D); the backward reverses it."""

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
        # Exchanged even if this rank does not need the result, because the other ranks wait for it.
        on_graph = torch.is_grad_enabled()
        back = _exchange(grad, ctx.receive, ctx.send, ctx.group, on_graph)
        return back, None, None, None, None


class _Take(torch.autograd.Function):
    """Gather y[i] = z[order[i] // choices] from z (M, D); places (M * choices) is the inverse of order.

    The backward also gathers: no atomics, the same result in every run.
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
    """Scatter z[order[i]] = y[i], with 0 where places is len(y): the transposed map of _Take."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        padded = y if len(y) == len(places) else F.pad(y, (0, 0, 0, 1))
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Take.apply(grad, *ctx.saved_tensors, 1), None, None
