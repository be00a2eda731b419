"""Output of a forward pass of PairInteractionMoE."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flmoe_kernels.ops.pair_moe.results import with_shapes


class PairOutput(NamedTuple):
    """Output of PairInteractionMoE, which defines P, E and E_pair.

    Latents, mass and losses have the statistics dtype: float64 for float64 parameters and float32 for all others,
    so that sums over many token pairs do not overflow float16. The rest has the parameters' dtype.

    logits: (B, C), or None without classes.
    expert_logits: (B, E, C), whose sum over E plus the bias is logits; or None.
    latents: (E, B, P * V), each expert's accumulated messages of every modality pair divided by the
        normalizer; 0 if a pair does not have the expert. None with neither classes nor losses.
    mass: for each modality pair (m, n) a (B, E_pair, L_m + 1): the gate probabilities of token i of modality m
        summed over n's valid tokens and anchor; the last i is m's anchor. The experts are
        `layer.pair_experts[p]`.
    tokens: with token_outputs (B, L_m, dims[m]) per modality, 0 where masked, L_m = 0 for a missing modality;
        otherwise None.
    losses: (M + 2,) if requested: uniqueness of each modality, synergy, redundancy.
    """

    logits: Tensor | None = None
    expert_logits: Tensor | None = None
    latents: Tensor | None = None
    mass: tuple[Tensor, ...] = ()
    tokens: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None

    def __repr__(self) -> str:
        return with_shapes(self)
