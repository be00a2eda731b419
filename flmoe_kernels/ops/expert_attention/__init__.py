"""Multi-head softmax attention over packed rows."""

from .api import expert_attention as expert_attention
