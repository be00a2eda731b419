"""Results of `attribute`: values of tokens, by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flmoe_kernels.explain.archive import Saved
from flmoe_kernels.explain.games.models import place_of
from flmoe_kernels.explain.games.tokens import candidates, min_max

ROLLOUT, GRADIENT_ROLLOUT, INTEGRATED = METHODS = (
    "attention_rollout",
    "gradient_rollout",
    "integrated_gradients",
)
MIXTURE, EXPERT = EXPLAINS = ("mixture", "expert")


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Saved):
    """Contribution of every token to the target's logit, by sample and expert; float64, without autograd graph.

    Attributes:
        index: the method, one of METHODS.
        explains: "mixture" or "expert", see `attribute`.
        experts: E names.
        values: M x (B, E, L_m), 0 for padding.
        mixture: M x (B, L_m), of all experts together: sum_e w_e values_e if each expert's own score is
            explained, or if values do not depend on the score (attention rollout); sum_e values_e if the
            experts' parts of the mixture are explained. Magnitudes are taken after that sum.
        valid: M x (B, L_m) bool.
        weights: (B, E), the mixture's weights of the experts at these inputs.
        targets: (B, C), weights of the explained classes; rows sum to 1.
        multi_label: whether several classes may be explained.
        scores: (B, E), the explained scores of the experts.
        completeness_error: (B, E), for integrated gradients the score less its value at the baseline less the
            sum of the values before any magnitude is taken; else None.
        budget: evaluations of each sample's score per expert.
        settings: arguments of the method.
    """

    _ARRAYS: ClassVar[tuple[str, ...]] = ("weights", "targets", "scores", "completeness_error")
    _LISTS: ClassVar[tuple[str, ...]] = ("values", "mixture", "valid")
    _OPTIONAL: ClassVar[tuple[str, ...]] = ("completeness_error",)

    index: str
    explains: str
    experts: tuple[str, ...]
    values: tuple[Tensor, ...]
    mixture: tuple[Tensor, ...]
    valid: tuple[Tensor, ...]
    weights: Tensor
    targets: Tensor
    multi_label: bool
    scores: Tensor
    completeness_error: Tensor | None
    budget: int
    settings: dict[str, str | int]

    def of(self, expert: str | int | None = None) -> list[Tensor]:
        """Return the values M x (B, L_m) of one expert, by name or position, or of the mixture (None)."""
        if expert is None:
            return [x.clone() for x in self.mixture]
        place = place_of(expert, self.experts)
        return [x[:, place].clone() for x in self.values]

    def normalized(
        self, expert: str | int | None = None, exempt: Sequence[int] = ()
    ) -> list[Tensor]:
        """As `of`, scaled for each sample and modality to 0..1 over its valid tokens: (x - min) / (max - min).

        Padding is 0, and all values are 0 if they are equal. The published evaluator does not set padding or the
        exempt token to 0.

        Args:
            exempt: modalities whose token 0 is excluded and set to 0.
        """
        chosen = candidates(self.valid, exempt)
        return [min_max(x, ok) for x, ok in zip(self.of(expert), chosen, strict=True)]

    def __repr__(self) -> str:
        lengths = ", ".join(f"{m}: {x.shape[2]} tokens" for m, x in enumerate(self.values))
        return (
            f"Attribution({self.index} of the {self.explains} for {len(self.weights)} samples; "
            f"modalities {lengths}; experts {', '.join(self.experts)})"
        )
