"""Peers of interaction_moe: faster forms of the reference layer.

Fused attention, torch.compile and other precision; parameters and inputs are the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.layers.interaction_moe.fusion import Attention
from flmoe_kernels.layers.interaction_moe.fusion_transformer import FusionTransformer
from flmoe_kernels.layers.interaction_moe.module import InteractionMoE
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.operators import interaction_moe as operator
from flmoe_kernels.profile.prepared import Context, Prepared

from . import common

SDPA, COMPILED = "reference+sdpa", "compiled+sdpa"
# These use float32 parameters in cases of half precision, because common training code does not round parameters.
TF32, AUTOCAST = "reference, TF32", "compiled+sdpa, autocast"
FLOAT32 = "float32"  # this package's layer
PEERS = (SDPA, COMPILED, TF32, AUTOCAST, FLOAT32)
_COMPILED = (COMPILED, AUTOCAST)
_OWN_PRECISION = (TF32, AUTOCAST, FLOAT32)


class SdpaAttention(Attention):
    """The reference's attention, computed by torch's scaled_dot_product_attention.

    On the CPU, torch uses its fused kernel only without dropout.
    """

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        heads, width = self.num_heads, dim // self.num_heads
        q = self.q(x).view(batch, length, heads, width).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, heads, width).permute(2, 0, 3, 1, 4)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        p = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, length, dim)))


def with_sdpa(layer: ReferenceInteractionMoE) -> ReferenceInteractionMoE:
    """A copy of the reference whose attention is torch's scaled_dot_product_attention."""
    result = copy.deepcopy(layer)
    for module in result.modules():
        if type(module) is Attention:
            module.__class__ = SdpaAttention
    return result


def unavailable_reason(case: Case, name: str) -> str:
    experts = operator.shape_of(case).experts
    if name in _OWN_PRECISION and case.dtype not in (torch.bfloat16, torch.float16):
        return "runs only in half precision"
    if name in _COMPILED and experts:
        return "the loop over routed experts cannot be compiled as one graph"
    return ""


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    adopt = functools.partial(_adopt, name)
    dtype = torch.float32 if name in _OWN_PRECISION else dtype
    return operator.prepare_layer(case, adopt, dtype, _context_of(case, name))


def _adopt(name: str, reference: ReferenceInteractionMoE) -> Any:
    if name == TF32:
        return reference
    if name == FLOAT32:
        return InteractionMoE.adopt(reference)
    layer = with_sdpa(reference)
    if name in _COMPILED:
        common.prepare_compiler()
        # Each fusion pass is compiled separately: the whole forward would unroll twelve or twenty passes into one
        # graph, which takes more than ten minutes to compile.
        for module in layer.modules():
            if isinstance(module, FusionTransformer):
                module.compile(dynamic=False)
    return layer


def _context_of(case: Case, name: str) -> Context:
    if name == TF32:
        return functools.partial(common.tf32, case.device)
    if name == AUTOCAST:
        return functools.partial(torch.autocast, case.device.split(":")[0], case.dtype)
    return contextlib.nullcontext
