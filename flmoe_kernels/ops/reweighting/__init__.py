"""The reweighting of the experts: its pooled inputs, and the mixture of their logits."""

from .api import mix_experts as mix_experts
from .api import reweighting_features as reweighting_features
