"""Explanations as pictures: matplotlib Figures that read in black and white, made without pyplot or any global."""

from .canvas import png_bytes as png_bytes
from .curves import drop_curve as drop_curve
from .heat_map import token_patch_map as token_patch_map
from .network import pair_network as pair_network
from .weights import expert_weights as expert_weights
