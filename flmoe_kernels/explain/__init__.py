"""Explanations of one prediction: values of coalitions of tokens, and indices of token pairs from them."""

from .additive import TwoAdditiveGame as TwoAdditiveGame
from .attribution import attribute as attribute
from .attribution_values import Attribution as Attribution
from .drops import MaskingDrops as MaskingDrops
from .faithfulness import faithfulness as faithfulness
from .faithfulness import pair_masking as pair_masking
from .figures import drop_curve as drop_curve
from .figures import expert_weights as expert_weights
from .figures import pair_network as pair_network
from .figures import token_patch_map as token_patch_map
from .games import TokenGame as TokenGame
from .games import token_means as token_means
from .interactions import probe_game as probe_game
from .interactions import probe_pairs as probe_pairs
from .interactions import redundancy_gap as redundancy_gap
from .interactions import shapley_interactions as shapley_interactions
from .results import PairValues as PairValues
from .run import Run as Run
from .sampling import Sampling as Sampling
