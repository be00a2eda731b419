"""Layers and checkpoints of the published code: recognised, converted, compared, swapped."""
