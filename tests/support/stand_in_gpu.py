"""A stand-in for a GPU whose kernels have not been checked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flmoe_kernels.core import backend, self_check


def on_cuda(dtype: torch.dtype = torch.float32) -> Any:
    """Tensor properties that `choose` reads, for devices that this machine may not have."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


def stand_in(patch: pytest.MonkeyPatch, check: self_check.Check, cache: Path | str) -> None:
    """Until the patches end, all backends take CUDA tensors, which `check` checks; results are kept in `cache`."""
    patch.setenv("XDG_CACHE_HOME", str(cache))
    patch.setattr(torch.cuda, "get_device_name", lambda index=None: "Stand-in GPU")
    patch.setattr(backend, "_refusal", lambda op, name, tensor: "")
    patch.setattr(self_check, "architecture_of", lambda device: 90)
    patch.setattr(self_check, "capturing", lambda device: False)
    new_process(patch, check)


def new_process(patch: pytest.MonkeyPatch, check: self_check.Check) -> None:
    """Forget what the process knows, except for the files."""
    patch.setattr(self_check, "_check", check)
    patch.setattr(self_check, "_failures", {})
    patch.setattr(self_check, "_warned", set())
