"""Reference of the routed MLP in plain PyTorch.

out[n] = sum over k of weight[n, k] * mlp of expert index[n, k] (x[n]);  index -1 adds nothing
Gated experts multiply the hidden layer by an activated second one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core.dtypes import without_autocast
from flmoe_kernels.core.validation import is_batched

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def routed_mlp(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    act: str,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
) -> Tensor:
    """Compute out (N, D) from x (N, D), expert by expert."""
    out = torch.zeros_like(x)
    activation = ACTIVATIONS[act]
    # Autocast would change the dtype of the products; it has no effect on the kernels either.

    def expert(e: int, rows: Tensor) -> Tensor:
        hidden = F.linear(rows, w_in[e], None if b_in is None else b_in[e])
        if w_gate is None:
            hidden = activation(hidden)
        else:
            gate = F.linear(rows, w_gate[e], None if b_gate is None else b_gate[e])
            hidden = activation(gate) * hidden
        return F.linear(hidden, w_out[e], None if b_out is None else b_out[e])

    with without_autocast(x.device):
        for e in range(w_in.shape[0]):
            chosen = index == e
            if is_batched(index):
                # The calls of a function under vmap differ in an expert's rows, so it computes all rows.
                share = torch.where(chosen, weight, 0.0).sum(dim=1, keepdim=True)
                out = out + torch.where(chosen.any(dim=1, keepdim=True), expert(e, x) * share, 0.0)
            else:
                token, choice = chosen.nonzero(as_tuple=True)
                row = expert(e, x[token])
                out = out.index_add(0, token, row * weight[token, choice, None].to(row.dtype))
    return out
