"""The choice of launch configurations by time instead of by table: opt-in, by `autotune` or FLMOE_AUTOTUNE=1."""

from .asking import bucket, question
from .finding import Question
from .switch import autotune, enabled
from .trial import Trial
from .tuner import choose

__all__ = ["Question", "Trial", "autotune", "bucket", "choose", "enabled", "question"]
