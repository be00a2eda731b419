"""Tests of the available memory of the host and of a container."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flmoe_kernels.core import memory


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int
) -> None:
    """If a control group or one of its parents has a limit, that limit applies, not the host's memory."""
    line, top, limit, used, cache = {
        1: (
            "4:cpu,memory:/job/step",
            tmp_path / "memory",
            "limit_in_bytes",
            "usage_in_bytes",
            "total_",
        ),
        2: ("0::/job/step", tmp_path, "max", "current", ""),
    }[version]
    (top / "job" / "step").mkdir(parents=True)
    groups, meminfo = tmp_path / "groups", tmp_path / "meminfo"
    groups.write_text(f"2:cpuset:/\n{line}\n")
    meminfo.write_text("MemAvailable: 1048576 kB\n")
    for name, path in (("OWN_GROUPS", groups), ("GROUPS", tmp_path), ("MEMINFO", meminfo)):
        monkeypatch.setattr(memory, name, path)
    cpu = torch.device("cpu")
    assert memory.available_bytes(cpu) == 2**30, "no limits to read"
    for folder, most, taken in (("job", 2**28, 2**27), ("job/step", "max", 2**20)):
        (top / folder / f"memory.{limit}").write_text(f"{most}\n")
        (top / folder / f"memory.{used}").write_text(f"{taken}\n")
    assert memory.available_bytes(cpu) == 2**27
    (top / "job" / "memory.stat").write_text(f"anon 5\n{cache}inactive_file {2**25}\n")
    assert memory.available_bytes(cpu) == 2**27 + 2**25, "the page cache can be reclaimed"
    (top / "job" / f"memory.{used}").write_text(f"{2**29}\n")
    assert memory.available_bytes(cpu) == 0
