"""Interaction mixture of experts: the published layer and its fast replacement."""

from .module import InteractionMoE as InteractionMoE
from .reference import FusionTransformer as FusionTransformer
from .reference import ReferenceInteractionMoE as ReferenceInteractionMoE
