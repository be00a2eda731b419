"""Fast kernels for interaction mixtures of experts (FL-I2MoE) and their explanations."""

from ._version import __version__ as __version__
from .backend import BackendUnavailable as BackendUnavailable
from .backend import available_backends as available_backends
from .backend import use_backend as use_backend
from .expert_attention import expert_attention as expert_attention
from .interaction_moe import FusionTransformer as FusionTransformer
from .interaction_moe import InteractionMoE as InteractionMoE
from .interaction_moe import ReferenceInteractionMoE as ReferenceInteractionMoE
from .pair_moe import PairExplanation as PairExplanation
from .pair_moe import PairInteractionMoE as PairInteractionMoE
from .pair_moe import PairOutput as PairOutput
from .pair_moe import pair_map as pair_map
from .pair_moe import pair_moe as pair_moe
from .pair_moe import top_pairs as top_pairs
from .routed_mlp import RoutedMLP as RoutedMLP
from .routed_mlp import routed_mlp as routed_mlp
from .swap import SwapReport as SwapReport
from .swap import swap as swap
from .tuning import autotune as autotune
