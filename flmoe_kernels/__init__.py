"""Fast kernels for interaction mixtures of experts (FL-I2MoE) and their explanations."""

from typing import Any as _Any

from ._version import __version__ as __version__
from .core import self_check as _self_check
from .core.backend import BackendUnavailable as BackendUnavailable
from .core.backend import available_backends as available_backends
from .core.backend import use_backend as use_backend
from .core.blocks import empty_cache as empty_cache
from .core.triton.tuning import autotune as autotune
from .layers.interaction_moe.fusion_transformer import FusionTransformer as FusionTransformer
from .layers.interaction_moe.module import InteractionMoE as InteractionMoE
from .layers.interaction_moe.reference import ReferenceInteractionMoE as ReferenceInteractionMoE
from .layers.interaction_moe.regression import InteractionMoERegression as InteractionMoERegression
from .layers.interaction_moe.regularizers import rep_barlow as rep_barlow
from .layers.interaction_moe.regularizers import rep_cka as rep_cka
from .layers.interaction_moe.regularizers import rep_cos as rep_cos
from .layers.interaction_moe.regularizers import warmup_scale as warmup_scale
from .layers.pair_interaction_moe.explanation import PairExplanation as PairExplanation
from .layers.pair_interaction_moe.module import PairInteractionMoE as PairInteractionMoE
from .layers.pair_interaction_moe.output import PairOutput as PairOutput
from .layers.routed_mlp.module import RoutedMLP as RoutedMLP
from .ops.expert_attention.api import expert_attention as expert_attention
from .ops.pair_moe.api import pair_map as pair_map
from .ops.pair_moe.api import pair_moe as pair_moe
from .ops.pair_moe.api import top_pairs as top_pairs
from .ops.routed_mlp.api import routed_mlp as routed_mlp
from .published.report import SwapReport as SwapReport
from .published.swap import swap as swap


def _first_use(*request: _Any) -> str:
    from .profile.first_use import failure

    return failure(*request)


# core may not import profile, and only a GPU needs it.
_self_check.install(_first_use)
