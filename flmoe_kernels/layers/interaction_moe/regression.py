"""InteractionMoERegression: the interaction layer with losses for regression."""

from __future__ import annotations

from .module import InteractionMoE


class InteractionMoERegression(InteractionMoE):
    """InteractionMoE for regression: the interaction losses are mean squared errors of the outputs.

    Let z be an expert's output (B, C) on the full input, and z_m that on the view that replaces modality m. The
    loss of the uniqueness expert of modality m is the mean over the other modalities n of
    MSE(z, z_n) - MSE(z, z_m). Synergy and redundancy have the mean over m of MSE(z, z_m). Everything else is as in
    InteractionMoE.

    Source: arXiv 2505.19190.
    """

    regression = True
