"""Classifier of token sequences whose logits are 2-additive games over tokens."""

from .explanation import PairExplanation as PairExplanation
from .module import PairInteractionMoE as PairInteractionMoE
from .output import PairOutput as PairOutput
