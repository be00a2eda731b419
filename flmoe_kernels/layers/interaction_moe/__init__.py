"""Interaction mixture of experts: the published layer and its fast replacement."""

from .fusion_transformer import FusionTransformer as FusionTransformer
from .module import InteractionMoE as InteractionMoE
from .reference import ReferenceInteractionMoE as ReferenceInteractionMoE
