"""Explanations of a prediction: attribution to tokens, indices of token pairs, masking evaluation, figures."""

from .attribution.attribute import attribute as attribute
from .attribution.values import Attribution as Attribution
from .estimators.interactions import probe_game as probe_game
from .estimators.interactions import probe_pairs as probe_pairs
from .estimators.interactions import redundancy_gap as redundancy_gap
from .estimators.interactions import shapley_interactions as shapley_interactions
from .estimators.results import PairValues as PairValues
from .estimators.run import Run as Run
from .estimators.sampling import Sampling as Sampling
from .figures.curves import drop_curve as drop_curve
from .figures.heat_map import token_patch_map as token_patch_map
from .figures.network import pair_network as pair_network
from .figures.weights import expert_weights as expert_weights
from .games.additive import TwoAdditiveGame as TwoAdditiveGame
from .games.token_game import TokenGame as TokenGame
from .games.tokens import token_means as token_means
from .masking.drops import MaskingDrops as MaskingDrops
from .masking.faithfulness import faithfulness as faithfulness
from .masking.faithfulness import pair_masking as pair_masking
from .masking.performance import Performance as Performance
from .masking.performance import performance as performance
from .patterns.compute import concentration as concentration
from .patterns.compute import specificity as specificity
from .patterns.results import PatternMeasures as PatternMeasures
