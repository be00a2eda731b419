"""Peers of routed_mlp: index loop, padded products, grouped products."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.operators import routed_mlp as operator
from flmoe_kernels.profile.prepared import Prepared
from flmoe_kernels.profile.shapes import is_cuda

# The index loop is the reference's code.
LOOP, BMM = "index loop", "batched bmm"
GROUPED, SCATTERMOE = "grouped_mm", "scattermoe"
PEERS = (LOOP, BMM, GROUPED, SCATTERMOE)


def unavailable_reason(case: Case, name: str) -> str:
    if name != SCATTERMOE:
        return ""
    if importlib.util.find_spec("scattermoe") is None:
        return "not installed"
    if not is_cuda(case.device):
        return "runs only on GPUs"
    return "some releases do not support biases" if case.variant == "bias" else ""


def version(name: str) -> str:
    installed = name == SCATTERMOE and importlib.util.find_spec(name) is not None
    return importlib.metadata.version(name) if installed else torch.__version__


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    if name == LOOP:
        return operator.prepare(case, REFERENCE, dtype)
    if name == BMM:
        shape = operator.shape_of(case)
        index, _ = operator.make_inputs(shape, case.variant, case.device)
        # The padded length is computed before timing, like a fixed capacity, so the peer need not wait for it.
        rows = int(torch.bincount(index.reshape(-1), minlength=shape.experts).max())
        return operator.prepare_routed(case, functools.partial(batched_bmm, rows), dtype)
    function = grouped_mm if name == GROUPED else scattered
    return operator.prepare_routed(case, function, dtype)


def batched_bmm(
    rows: int, x: Tensor, index: Tensor, weight: Tensor, experts: operator.Experts
) -> Tensor:
    """Batched products over all experts; tokens are gathered into (E, rows, D), padded with zeros."""
    w_in, w_out, b_in, b_out, w_gate = experts
    count, _, width = w_in.shape
    expert, order, bounds = _sorted(index, count)
    starts = bounds[:-1].index_select(0, expert)
    place = expert * rows + torch.arange(len(expert), device=x.device) - starts
    token = order // index.shape[1]
    # The backward of index_select adds directly; the backward of x[token] would sort first.
    gathered = x.new_zeros(count * rows, width).index_copy(0, place, x.index_select(0, token))
    gathered = gathered.view(count, rows, width)
    gate = None if w_gate is None else _linear(gathered, w_gate, None)
    hidden = _activate(_linear(gathered, w_in, b_in), gate)
    out = _linear(hidden, w_out, b_out).reshape(count * rows, -1)
    weighted = out.index_select(0, place) * weight.reshape(-1).index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, weighted)


def _sorted(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert of every choice in sorted order, the sorting permutation, and the bounds of the experts (E + 1).

    The bounds come from torch.searchsorted, because torch.bincount makes the host wait for a GPU.
    """
    expert, order = index.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(expert, torch.arange(experts + 1, device=index.device))
    return expert, order, bounds


def _activate(hidden: Tensor, gate: Tensor | None) -> Tensor:
    return F.gelu(hidden) if gate is None else F.silu(gate) * hidden


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear map of x (E, n, D) with each expert's weight (E, F, D) and bias (E, F)."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias[:, None], x, weight.mT)


def grouped_mm(x: Tensor, index: Tensor, weight: Tensor, experts: operator.Experts) -> Tensor:
    """torch's grouped products over tokens sorted by expert."""
    w_in, w_out, b_in, b_out, w_gate = experts
    expert, order, bounds = _sorted(index, w_in.shape[0])
    token, ends = order // index.shape[1], bounds[1:].to(torch.int32)
    rows = x.index_select(0, token)
    hidden = F.grouped_mm(rows, w_in.mT, offs=ends)
    hidden = hidden if b_in is None else hidden + b_in.index_select(0, expert)
    gate = None if w_gate is None else F.grouped_mm(rows, w_gate.mT, offs=ends)
    hidden = _activate(hidden, gate)
    out = F.grouped_mm(hidden, w_out.mT, offs=ends)
    out = out if b_out is None else out + b_out.index_select(0, expert)
    weighted = out * weight.reshape(-1).index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, weighted)


def scattered(x: Tensor, index: Tensor, weight: Tensor, experts: operator.Experts) -> Tensor:
    """ScatterMoE's linear layers (arXiv 2403.08245): the first gather rows, the last adds the results."""
    w_in, w_out, *_, w_gate = experts
    package = importlib.import_module("scattermoe.parallel_experts")
    places = package.flatten_sort_count(index, num_experts=w_in.shape[0])

    def grouped(w: Tensor) -> Tensor:
        rows: Tensor = package.parallel_linear(x, w.mT, index.shape[1], *places, grouped_out=True)
        return rows

    hidden = _activate(grouped(w_in), None if w_gate is None else grouped(w_gate))
    return package.parallel_linear(hidden, w_out.mT, 1, *places, grouped_in=True, gates=weight)
