"""Validated request of the command `explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.attribution.values import GRADIENT_ROLLOUT
from flmoe_kernels.explain.attribution.values import METHODS as ATTRIBUTIONS
from flmoe_kernels.explain.estimators.candidates import ACROSS, ALL, SCREENED
from flmoe_kernels.explain.estimators.run import METHODS
from flmoe_kernels.explain.games.masked import FILLS

LABEL, PREDICTED = "label", "predicted"
_QUICK = {"samples": 1, "budget": 256, "top": 2, "repeats": 2}


@dataclass(frozen=True)
class Request:
    """Input files, and what to compute for the first samples of the data.

    With 356 valid tokens of width 256 and four experts (the shape mmimdb, of which two cores evaluate about 130
    coalitions per second), the default budget and the maskings take about half a minute per sample.
    """

    checkpoint: Path  # see `load_layer`
    data: Path  # see `load_features`
    out: Path  # created if missing
    layer: Mapping[str, Any] = field(default_factory=dict)  # options of `load_layer`
    samples: int = 4  # the first of the file
    attribution: str = GRADIENT_ROLLOUT  # method of `attribute`
    method: str = "auto"  # of `probe_pairs`
    budget: int = 3072  # the largest number of evaluated coalitions per sample
    top: int = 5  # tokens of largest |attribution| in each modality, whose pairs are candidates
    pairs: str = ACROSS  # "screened": among the pairs of all tokens
    # "label", of the file; "predicted"; or a class; None: the label if there is one, else predicted.
    target: str | None = None
    fill: str = "zero"  # "mean" is over all samples of the file
    # Modalities whose token 0, for example a text encoder's first token, is never masked in drop curves and not
    # counted in the mean of fill="mean". In coalitions of pairs it may be absent like any token.
    exempt: tuple[int, ...] = ()
    repeats: int = 10  # random sets of tokens for each identified set
    seed: int = 0
    modality_names: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in {"samples": 1, "budget": 1, "top": 1, "repeats": 0, "seed": 0}.items():
            check.require_count(name, getattr(self, name), least)
        check.require_choice("attribution", self.attribution, ATTRIBUTIONS)
        check.require_choice("method", self.method, METHODS)
        check.require_choice("pairs", self.pairs, (ACROSS, ALL, SCREENED))
        check.require_choice("fill", self.fill, FILLS)
        for modality in self.exempt:
            check.require_count("exempt", modality, 0)
        words = (None, LABEL, PREDICTED)
        # isdecimal also accepts digits of other scripts, and int() reads them.
        if self.target not in words and not str(self.target).isdecimal():
            raise ValueError(
                f"target: expected {LABEL}, {PREDICTED} or a class, got {self.target!r}"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any], quick: bool) -> Request:
        """Build a request from options by field name, None for defaults; `quick` defaults take seconds."""
        given = {name: value for name, value in options.items() if value is not None}
        return cls(**{**(_QUICK if quick else {}), **given})

    def require_counts(self, modalities: int, classes: int) -> None:
        """Check the numbers of names, which only the layer determines. Raises ValueError."""
        for name, count in {"modality_names": modalities, "class_names": classes}.items():
            names = getattr(self, name)
            if names is not None and len(names) != count:
                raise ValueError(f"{name}: expected {count} names for this layer, got {len(names)}")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, without the files and the layer."""
        known = dataclasses.asdict(self)
        for name in ("checkpoint", "data", "out", "layer"):
            del known[name]
        return known
