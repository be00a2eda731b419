"""Public API of pair_moe: docstrings, validation, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation as check

from . import op as _op  # noqa: F401  registers flmoe::pair_moe
from . import reference
from .call import REDUCTIONS, PairCall
from .kinds import KINDS, MAX_EXPERTS, kind_codes
from .results import PairMoEOutput, TopPairs, near_ties

__all__ = ["PairMoEOutput", "TopPairs", "pair_map", "pair_moe", "top_pairs"]
_OPERATOR = "pair_moe"


def pair_moe(
    q: Tensor,
    k: Tensor,
    a: Tensor,
    c: Tensor,
    *,
    kinds: Sequence[str],
    gate_bias: Tensor | None = None,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    reduce: str = "none",
    backend: str | None = None,
) -> PairMoEOutput:
    """Token-pair gated mixture of interaction experts: gate, dispatch and accumulation of all pairs at once.

    Like attention, but the softmax runs over the experts of each pair, not over the keys of each query, so
    pairs are independent and sums over them are exact:

        logit[b,e,i,j] = q[b,e,i] . k[b,e,j] / (sqrt(R) * temperature) + gate_bias[e]
        p[b,:,i,j]     = softmax over e; with top_k only over the top_k largest (ties: lower e), the rest 0;
                         0 where mask_a[b,i] or mask_b[b,j] is False
        y[b,e,i]       = sum over j of p * message,   mass[b,e,i] = sum over j of p

    The message is a_i for "unique_a", c_j for "unique_b", a_i * c_j for "synergy", (a_i + c_j) / 2 for
    "redundancy" and 0 for "null". For the outputs of side b, call pair_moe(k, q, c, a, kinds=swap_sides(kinds)).
    Both outputs are differentiable. Only the reference allocates anything of size La x Lb. Results are bitwise
    equal for any number of threads.

    Args:
        q, k: (B, E, La, R) and (B, E, Lb, R), E from 1 to 8. float32, float64, bfloat16 or float16.
        a, c: (B, E, La, V) and (B, E, Lb, V), same dtype.
        kinds: E names.
        gate_bias: (E), same dtype or that of mass.
        mask_a, mask_b: (B, La) and (B, Lb) bool, True = valid. A masked token adds nothing and gets no gradient,
            whatever its values are.
        top_k: number of experts per pair, 1 to E; None for all.
        temperature: positive.
        reduce: "none" for y (B, E, La, V), "experts" for the sum over e (B, La, V), "pool" for the sum
            over i (B, E, V).
        backend: "reference", "cpu", "triton" or, only on request, "cuda"; default by device, see
            flmoe_kernels.use_backend.

    Returns:
        (y, mass): y in the inputs' dtype, for "pool" in that of mass; mass (B, E, La) in float32 (float64 for
        float64). Under autocast q, k, a and c are first cast to its dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; the error names it.
        BackendUnavailable: the requested backend cannot run this.

    Cost: 2 R E FLOP per valid pair and 2 V for each expert whose message needs c_j at that reduction; memory
    O(B * E * (La + Lb) * (R + V)). The backward recomputes the probabilities.
    Source: FL-I2MoE's experts (arXiv 2603.13326) at the level of token pairs; the operator is new in this package.
    """
    call = _call(q, k, a, c, kinds, gate_bias, mask_a, mask_b, top_k, temperature)
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    name = backends.choose(_OPERATOR, q, backend)
    if name == backends.REFERENCE:
        return PairMoEOutput(*reference.forward(call, reduce))
    return PairMoEOutput(*torch.ops.flmoe.pair_moe(*call.arguments, reduce, name))


def pair_map(
    q: Tensor,
    k: Tensor,
    a: Tensor,
    c: Tensor,
    head: Tensor,
    *,
    kinds: Sequence[str],
    target: Any = None,
    gate_bias: Tensor | None = None,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Dense map of every pair's contribution through a linear head: phi = p * (message . head).

    Meant for maps that a person can look at; `top_pairs` returns the largest contributions at any size.

    Args:
        head: (E, V), or (E, V, C) with a target class for each sample.
        target: a class for all samples, or (B) integers in 0..C-1; with head (E, V, C) only.
        others: as in pair_moe.

    Returns:
        phi (B, E, La, Lb), float32 (float64 for float64); 0 for masked pairs. Differentiable only with
        backend="reference".

    Raises:
        TypeError, ValueError, BackendUnavailable: as in pair_moe.
    """
    call = _call(q, k, a, c, kinds, gate_bias, mask_a, mask_b, top_k, temperature)
    weight = _head_of(call, head, target)
    name = backends.choose(_OPERATOR, q, backend)
    if name == backends.REFERENCE:
        return reference.pair_map(call, weight)
    return torch.ops.flmoe.pair_map(*call.arguments, weight, name)


def top_pairs(
    q: Tensor,
    k: Tensor,
    a: Tensor,
    c: Tensor,
    head: Tensor,
    *,
    n_pairs: int,
    kinds: Sequence[str],
    target: Any = None,
    gate_bias: Tensor | None = None,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> TopPairs:
    """The n_pairs largest contributions phi (see pair_map) of each expert and of the sum over experts.

    No (La, Lb) map is stored. For the most negative contributions, pass -head.

    Args:
        n_pairs: at least 1, and n = min(n_pairs, max(La * Lb, 1)) pairs are returned; if fewer pairs are valid,
            the rest is -inf with i = j = -1.
        others: as in pair_map.

    Returns:
        TopPairs in descending order; ties by the lower (i, j); NaN first, as in torch.topk.
        Not differentiable, except within torch.func transforms, which use the reference.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in pair_moe.
    """
    call = _call(q, k, a, c, kinds, gate_bias, mask_a, mask_b, top_k, temperature)
    weight = _head_of(call, head, target)
    check.require_count("n_pairs", n_pairs, 1)
    name = backends.choose(_OPERATOR, q, backend)
    pairs = max(call.rows * call.columns, 1)
    n_pairs = min(n_pairs, pairs)
    # One more, which shows whether the last one is a near-tie.
    count = min(n_pairs + 1, pairs)
    # In a torch.func transform, results without a graph would count as constants.
    with nullcontext() if backends.transforms_active() else torch.no_grad():
        if name == backends.REFERENCE:
            top = reference.top_pairs(call, weight, count)
        else:
            top = torch.ops.flmoe.top_pairs(*call.arguments, weight, count, name)
    tied = near_ties(top[0], n_pairs)
    values, i, j = (x[:, :, :n_pairs] for x in top)
    return TopPairs(
        values=values[:, :-1],
        i=i[:, :-1],
        j=j[:, :-1],
        total_values=values[:, -1],
        total_i=i[:, -1],
        total_j=j[:, -1],
        near_ties=tied[:, :-1],
        total_near_ties=tied[:, -1],
    )


def _call(
    q: Tensor,
    k: Tensor,
    a: Tensor,
    c: Tensor,
    kinds: Sequence[str],
    gate_bias: Tensor | None,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    top_k: int | None,
    temperature: float,
) -> PairCall:
    for name, x in (("q", q), ("k", k), ("a", a), ("c", c)):
        check.require_tensor(name, x)
        check.require_floating(name, x)
    q, k, a, c = check.autocast(q, k, a, c)
    if q.dim() != 4 or q.shape[3] < 1 or not 1 <= q.shape[1] <= MAX_EXPERTS:
        raise ValueError(
            f"q: expected (B, E, La, R) with E from 1 to {MAX_EXPERTS} and R from 1, "
            f"got {tuple(q.shape)}"
        )
    batch, experts, rows, rank = q.shape
    columns = k.shape[2] if k.dim() == 4 else -1
    width = a.shape[3] if a.dim() == 4 else -1
    check.require_shape("k", k, (batch, experts, columns, rank), "(B, E, Lb, R)")
    check.require_shape("a", a, (batch, experts, rows, width), "(B, E, La, V)")
    if width < 1:
        raise ValueError(f"a: expected (B, E, La, V) with V from 1, got {tuple(a.shape)}")
    check.require_shape("c", c, (batch, experts, columns, width), "(B, E, Lb, V)")
    for name, x in (("k", k), ("a", a), ("c", c)):
        check.require_same(name, x, "q", q)
    _require_kinds(kinds, experts)
    for name, mask, length in (("mask_a", mask_a, rows), ("mask_b", mask_b, columns)):
        _require_mask(name, mask, (batch, length), q)
    top_k = experts if top_k is None else top_k
    check.require_count("top_k", top_k, 1, experts)
    check.require_positive("temperature", temperature)
    codes = tuple(kind_codes(kinds))
    scale = 1.0 / (rank**0.5 * float(temperature))
    call = PairCall(q, k, a, c, gate_bias, mask_a, mask_b, codes, top_k, scale)
    _require_gate_bias(call)
    return call


def _require_kinds(kinds: Sequence[str], experts: int) -> None:
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise TypeError(f"kinds: expected a sequence of names, got {type(kinds).__name__}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: expected names among {', '.join(KINDS)}, got {kind!r}")
    if len(kinds) != experts:
        raise ValueError(f"kinds: expected {experts} names, one per expert of q, got {len(kinds)}")


def _require_mask(name: str, mask: Tensor | None, shape: tuple[int, int], q: Tensor) -> None:
    if mask is None:
        return
    check.require_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, True = valid, got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} as q, got {mask.device}")


def _require_gate_bias(call: PairCall) -> None:
    bias = call.gate_bias
    if bias is None:
        return
    check.require_tensor("gate_bias", bias)
    if tuple(bias.shape) != (call.experts,):
        raise ValueError(f"gate_bias: expected ({call.experts},), got {tuple(bias.shape)}")
    if bias.dtype not in (call.q.dtype, call.statistics):
        raise TypeError(
            f"gate_bias: expected dtype {call.q.dtype} as q or {call.statistics}, got {bias.dtype}"
        )
    if bias.device != call.q.device:
        raise ValueError(f"gate_bias: expected device {call.q.device} as q, got {bias.device}")


def _head_of(call: PairCall, head: Tensor, target: Any) -> Tensor:
    """The head of each sample's target, (B, E, V)."""
    check.require_tensor("head", head)
    (head,) = check.autocast(head)
    check.require_same("head", head, "q", call.q)
    if target is None:
        check.require_shape("head", head, (call.experts, call.width), "(E, V)")
        return head.expand(call.batch, -1, -1)
    classes = head.shape[2] if head.dim() == 3 else -1
    check.require_shape("head", head, (call.experts, call.width, classes), "(E, V, C)")
    target = check.require_classes("target", target, call.batch, classes, call.q.device)
    # Not head[..., target]: indexing would count a negative class from the end.
    return head.permute(2, 0, 1).index_select(0, target)
