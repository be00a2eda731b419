"""Reweighting of the experts: pooled inputs and the mixture of logits."""

from .api import mix_experts as mix_experts
from .api import reweighting_features as reweighting_features
