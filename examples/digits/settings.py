"""Sizes and lengths of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of one run. The defaults are those of the experiments in bench/experiments.

    With a smaller weight of the interaction losses, every expert learns every task, so the experts' shares
    are less informative. With a larger weight, the parity is learned less well.
    """

    seed: int = 0
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.1
    temperature: float = 1.0
    batch_size: int = 24
    steps: int = 160
    learning_rate: float = 4e-3
    interaction_weight: float = 1.0
    train_pairs: int = 4096
    test_pairs: int = 1000
    encoder_steps: int = 300
    timed_steps: int = 7
    timed_inferences: int = 15
    # Layer over token pairs; a smaller weight of the interaction losses: with 1.0 the parity is learned less well.
    pair_rank: int = 16
    pair_value_dim: int = 32
    pair_normalizer: float = 64.0
    pair_batch_size: int = 64
    pair_steps: int = 400
    pair_learning_rate: float = 3e-3
    pair_interaction_weight: float = 0.3

    @classmethod
    def choose(cls, seed: int, quick: bool) -> Settings:
        """Settings of the demo, shorter than the defaults; with `quick`, all stages run but nothing is learned."""
        demo = cls(
            seed=seed, num_layers=1, batch_size=16, steps=140, encoder_steps=150, pair_steps=250
        )
        if not quick:
            return demo
        return replace(
            demo,
            steps=6,
            train_pairs=256,
            test_pairs=128,
            encoder_steps=20,
            timed_steps=3,
            timed_inferences=3,
            pair_steps=6,
        )
