"""routed_mlp: the index loop over experts, dense products over all of them, and grouped products of others."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core.backend import BACKENDS, REFERENCE
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import gate
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Outputs, Prepared, prepare_function
from flmoe_kernels.profile.shapes import RoutedShape, is_cuda

from . import common

LOOP, EINSUM, BMM = "index loop", "one-hot einsum", "batched bmm"
GROUPED, SCATTERMOE, LIGER = "torch._grouped_mm", "scattermoe", "liger-kernel"
ORACLE = LOOP
PEERS = (LOOP, EINSUM, BMM, GROUPED, SCATTERMOE, LIGER)
# Hidden rows of all tokens in all experts that the one-hot product may hold.
_ROOM = 24 * 2**30
# x, weight, w_in, b_in, w_out, b_out -> out; without biases two None.
Routed = Callable[..., Tensor]


def lack(case: Case, name: str) -> str:
    shape = shape_of(case)
    if name == EINSUM:
        held = 8 * shape.tokens * shape.experts * shape.hidden * case.dtype.itemsize
        return f"it would hold about {held / 2**30:.0f} GiB" if held > _ROOM else ""
    if name == GROUPED:
        if not hasattr(torch, "_grouped_mm"):
            return f"torch {torch.__version__} has none"
        if case.dtype != torch.bfloat16:
            return "it is for bfloat16"
        if is_cuda(case.device) and torch.cuda.get_device_capability(case.device)[0] < 8:
            return "it needs sm_80 or newer"
    if name == SCATTERMOE:
        return _scattermoe_lack(case)
    if name == LIGER:
        missing = importlib.util.find_spec("liger_kernel") is None
        return "not installed" if missing else "its experts are gated (SwiGLU), these are not"
    return ""


def _scattermoe_lack(case: Case) -> str:
    if importlib.util.find_spec("scattermoe") is None:
        return "not installed"
    if not is_cuda(case.device):
        return "it is for GPUs"
    return "not every release of it takes biases" if case.variant != "no_bias" else ""


def version(name: str) -> str:
    if name in (SCATTERMOE, LIGER):
        return common.package_version(name)
    return torch.__version__


def shape_of(case: Case) -> RoutedShape:
    assert isinstance(case.shape, RoutedShape)
    return case.shape


def make_inputs(shape: RoutedShape, biased: bool, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """index (N, K), and x, weight, w_in, b_in, w_out, b_out, without biases those two absent."""
    generator = common.generator_of(device)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return common.draw(*size, generator=generator, scale=scale)

    tokens, width, hidden, experts = shape.tokens, shape.width, shape.hidden, shape.experts
    index, weight = gate(draw(tokens, experts), shape.choices, backend=REFERENCE)
    leaves = {"x": draw(tokens, width), "weight": weight}
    leaves["w_in"] = draw(experts, hidden, width, scale=width**-0.5)
    leaves["w_out"] = draw(experts, width, hidden, scale=hidden**-0.5)
    if biased:
        leaves |= {"b_in": draw(experts, hidden), "b_out": draw(experts, width)}
    return index, leaves


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    index, inputs = make_inputs(shape_of(case), case.variant == "bias", case.device)
    leaves = {key: common.place(case, x, dtype) for key, x in inputs.items()}
    call = _function_of(name, index, shape_of(case))

    def function(
        x: Tensor,
        weight: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None = None,
        b_out: Tensor | None = None,
    ) -> Outputs:
        return {"out": call(x, weight, w_in, b_in, w_out, b_out)}

    through = {"out": (leaves["x"].shape, dtype)}
    return prepare_function(function, leaves, case.phase, through)


def _function_of(name: str, index: Tensor, shape: RoutedShape) -> Routed:
    if name == EINSUM:
        return lambda *tensors: one_hot_einsum(index, *tensors)
    if name == BMM:
        # What padding needs is known beforehand, as a fixed capacity would be: the peer need not wait for it.
        rows = int(torch.bincount(index.reshape(-1), minlength=shape.experts).max())
        return lambda *tensors: batched_bmm(index, rows, *tensors)
    if name == GROUPED:
        return lambda *tensors: grouped_mm(index, *tensors)
    if name == SCATTERMOE:
        return lambda *tensors: scattered(index, *tensors)
    backend = name if name in BACKENDS else REFERENCE

    def call(x: Tensor, weight: Tensor, *weights: Tensor | None) -> Tensor:
        w_in, b_in, w_out, b_out = weights
        assert w_in is not None
        assert w_out is not None
        return routed_mlp(x, index, weight, w_in, b_in, w_out, b_out, backend=backend)

    return call


def one_hot_einsum(
    index: Tensor,
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> Tensor:
    """Every token through every expert, and a one-hot product that picks the chosen ones."""
    share = torch.einsum("nk,nke->ne", weight, F.one_hot(index, w_in.shape[0]).to(x.dtype))
    hidden = torch.einsum("nd,efd->enf", x, w_in)
    hidden = F.gelu(hidden if b_in is None else hidden + b_in[:, None])
    out = torch.einsum("enf,edf,ne->nd", hidden, w_out, share)
    return out if b_out is None else out + share @ b_out


def batched_bmm(
    index: Tensor,
    rows: int,
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> Tensor:
    """Tokens gathered into (E, rows, D), padded with zeros, and two batched products over all experts."""
    experts, _, width = w_in.shape
    expert, order, bounds = _sorted(index, experts)
    starts = bounds[:-1].index_select(0, expert)
    place = expert * rows + torch.arange(len(expert), device=x.device) - starts
    token = order // index.shape[1]
    # index_select, whose backward adds: that of x[token] sorts first.
    gathered = x.new_zeros(experts * rows, width).index_copy(0, place, x.index_select(0, token))
    hidden = _linear(gathered.view(experts, rows, width), w_in, b_in)
    out = _linear(F.gelu(hidden), w_out, b_out).reshape(experts * rows, -1)
    weighted = out.index_select(0, place) * weight.reshape(-1).index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, weighted)


def _sorted(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices sorted by expert, their places among all choices, and where each expert's begin and end (E + 1).

    By a search, since torch.bincount makes the host wait for a GPU.
    """
    expert, order = index.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(expert, torch.arange(experts + 1, device=index.device))
    return expert, order, bounds


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (E, n, D) by expert's weight (E, F, D) and bias (E, F)."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias[:, None], x, weight.mT)


def grouped_mm(
    index: Tensor,
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> Tensor:
    """Tokens sorted by expert, and torch's grouped products of their runs."""
    expert, order, bounds = _sorted(index, w_in.shape[0])
    token, ends = order // index.shape[1], bounds[1:].to(torch.int32)
    hidden = torch._grouped_mm(x.index_select(0, token), w_in.mT, offs=ends)
    hidden = F.gelu(hidden if b_in is None else hidden + b_in.index_select(0, expert))
    out = torch._grouped_mm(hidden, w_out.mT, offs=ends)
    out = out if b_out is None else out + b_out.index_select(0, expert)
    weighted = out * weight.reshape(-1).index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, weighted)


def scattered(
    index: Tensor,
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> Tensor:
    """ScatterMoE's two linear maps (arXiv 2403.08245), the gather in the first, the combination in the second."""
    assert b_in is None
    assert b_out is None
    package = importlib.import_module("scattermoe.parallel_experts")
    places = package.flatten_sort_count(index, num_experts=w_in.shape[0])
    hidden = package.parallel_linear(x, w_in.mT, index.shape[1], *places, grouped_out=True)
    hidden = F.gelu(hidden)
    return package.parallel_linear(hidden, w_out.mT, 1, *places, grouped_in=True, gates=weight)
