"""Attributes and methods of a layer that the fast layer would not have."""

from __future__ import annotations

from torch import nn

from .places import MODULE_STATE
from .source import IGNORED, is_trusted, known_methods

# Names of attributes and local functions in the published classes.
_NAMES = """
activation all_gates attn attn_drop bias capacity capture_attn capture_topk_pre_mix d_model drop dropout
dropout1 dropout2 experts experts_fused fc fusion_model fusion_sparse gate gate_hook h4toh head_dim htoh4
in_feat indicates interaction_experts is_full_modality kv last_attn last_topk_indices last_topk_pre_mix
last_topk_scores last_tot_expert loss mask mask_dict mlp mlp_sparse moe_group n_router network noise_epsilon
norm1 norm2 num_expert num_heads num_modalities out_feat pos_embed proj proj_drop q random_routing rank
require_attn_grad reweight scale self_attn slice_group slice_rank slice_size softmax softplus switch_eps
temperature top_k topk_logits tot_expert w_gate w_noise weight world_size
"""
PUBLISHED = frozenset(_NAMES.split())


def lost_members(layer: nn.Module, fast: nn.Module) -> list[str]:
    """Methods, class attributes and plain attributes that users added and the fast layer does not have."""
    known = _known_names()
    lost = {
        f"{base.__name__}.{name}"
        for base in _classes(layer)
        for name in vars(base)
        if not (name in known or name in IGNORED or name.startswith("__"))
    }
    for path, part in layer.named_modules():
        if is_trusted(type(part)):
            continue
        for name in vars(part).keys() - MODULE_STATE - known:
            if part is not layer:
                lost.add(f"{path}.{name}")
            elif name.startswith("_") or hasattr(fast, name):
                lost.add(name)
    return sorted(lost)


def _known_names() -> set[str]:
    methods = {name.rpartition(".")[2] for name in known_methods(None)}
    return {*PUBLISHED, *methods, *dir(nn.Module())}


def _classes(layer: nn.Module) -> set[type]:
    bases = {base for part in layer.modules() for base in type(part).__mro__}
    return {base for base in bases if not is_trusted(base)}
