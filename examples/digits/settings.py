"""Sizes and lengths of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of one run.

    With a smaller weight of the interaction losses, every expert learns every task, so the experts' shares
    are less informative. With a larger weight, the parity is learned less well.
    """

    seed: int = 0
    width: int = 64
    num_layers: int = 1
    num_heads: int = 4
    dropout: float = 0.1
    temperature: float = 1.0
    batch_size: int = 16
    steps: int = 140
    learning_rate: float = 4e-3
    interaction_weight: float = 1.0
    train_pairs: int = 4096
    test_pairs: int = 1000
    encoder_steps: int = 150
    # Layer over token pairs; a smaller weight of the interaction losses: with 1.0 the parity is learned less well.
    pair_rank: int = 16
    pair_value_dim: int = 32
    pair_normalizer: float = 64.0
    pair_batch_size: int = 64
    pair_steps: int = 250
    pair_learning_rate: float = 3e-3
    pair_interaction_weight: float = 0.3

    @classmethod
    def choose(cls, seed: int, quick: bool) -> Settings:
        """Settings of the demo; with `quick`, all stages run but nothing is learned."""
        if not quick:
            return cls(seed=seed)
        return cls(
            seed=seed,
            steps=6,
            train_pairs=256,
            test_pairs=128,
            encoder_steps=20,
            pair_steps=6,
        )
