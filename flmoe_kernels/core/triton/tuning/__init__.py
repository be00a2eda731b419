"""Autotuning of launch configurations: opt-in, by `autotune` or FLMOE_AUTOTUNE=1."""

from .timing import Trial
from .tuner import TuningKey, autotune, bucket, choose, enabled, tuning_key

__all__ = ["Trial", "TuningKey", "autotune", "bucket", "choose", "enabled", "tuning_key"]
