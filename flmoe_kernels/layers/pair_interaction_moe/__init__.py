"""Classifier of token sequences that is exactly a 2-additive game over the tokens."""

from .explanation import PairExplanation as PairExplanation
from .module import PairInteractionMoE as PairInteractionMoE
from .output import PairOutput as PairOutput
