"""Tests of launch tables: lookup by architecture, and resource limits.

tests/bench/test_aot.py compiles the kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flmoe_kernels.core.triton import tables
from flmoe_kernels.core.triton.tables import AMD, architecture_of, known
from flmoe_kernels.core.triton.target import Target, assume

pytest.importorskip("triton", reason="the package triton is not installed")

from flmoe_kernels.core.triton.launches import gpu_target, matrix_precision


def test_architectures_use_the_nearest_older_entry() -> None:
    nearest = {70: None, 75: None, 80: 80, 86: 86, 87: 86, 89: 86, 90: 90, 100: 100, 103: 100}
    # sm_12x is not a larger sm_100: it has the shared memory and matrix instructions of sm_89.
    nearest |= {110: 100, 120: 86, 121: 86, None: None, "gfx90a": AMD, "gfx942": AMD}
    assert {number: known(number) for number in nearest} == nearest


def test_amd_is_known_by_the_name_of_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compute capability, 9.4 here, looks like one of NVIDIA's."""
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    tables._architecture.cache_clear()
    try:
        assert architecture_of(torch.device("cuda", 0)) == "gfx942"
    finally:
        tables._architecture.cache_clear()
    targets = [gpu_target(name) for name in (90, "gfx90a", "gfx1100")]
    assert [(x.backend, x.warp_size) for x in targets] == [("cuda", 32), ("hip", 64), ("hip", 32)]


@pytest.mark.parametrize(
    ("architecture", "exact", "fast"),
    [(75, "ieee", "ieee"), (80, "tf32x3", "tf32"), ("gfx942", "ieee", "ieee")],
)
def test_tf32_is_used_where_it_exists(
    architecture: int | str, exact: str, fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, the precision is that of NVIDIA's newer GPUs."""
    for setting, expected in (("ieee", exact), ("tf32", fast)):
        settings = SimpleNamespace(fp32_precision=setting)
        monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
        with assume(Target(architecture, 100)):
            assert matrix_precision(torch.float32, torch.device("meta")) == expected
            assert matrix_precision(torch.bfloat16, torch.device("meta")) == exact
        assert matrix_precision(torch.float32, torch.device("cpu")).startswith("tf32")
