"""Compiles interaction_moe's own kernels ahead of time and prints one JSON report a line.

Run by test_interaction_triton_static, in a process of its own: the compiler is native code, and a process that
interprets kernels cannot compile them.
"""

from __future__ import annotations

import dataclasses
import json

import torch

from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.ops.interaction_losses.triton.launch import TABLE, call_launches

ARCHITECTURES = (80, 90, 100)
META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """A layer and its batch: a shape of SPEC.md, or one whose rows take several chunks of columns.

    masked: without masks a kernel gets None, and leaves out what reads them.
    """

    name: str
    batch: int
    lengths: tuple[int, ...]
    dim: int
    classes: int
    dtype: torch.dtype
    masked: bool = True

    def launches(self) -> dict[str, Launch]:
        modalities = len(self.lengths)
        experts, views, width = modalities + 2, modalities + 1, modalities * self.dim
        total = sum(self.lengths)
        mask = torch.empty((self.batch, total), dtype=torch.bool, device=META)
        return call_launches(
            torch.empty((experts, views, self.batch, width), dtype=self.dtype, device=META),
            torch.empty((self.batch, total, self.dim), dtype=self.dtype, device=META),
            mask if self.masked else None,
            self.lengths,
            torch.empty((experts, self.batch, self.classes), dtype=self.dtype, device=META),
        )


CASES = (
    StaticCase("mmimdb", 32, (320, 196), 256, 23, torch.bfloat16),
    StaticCase("mimic", 32, (4, 4, 4), 128, 2, torch.float32, masked=False),
    StaticCase("wide", 16, (40, 30, 20), 1024, 300, torch.float16),
)


def main() -> None:
    for case in CASES:
        for name, launch in case.launches().items():
            for architecture in ARCHITECTURES:
                report = dataclasses.asdict(launch.compile(architecture))
                facts = {"case": case.name, "kernel": name, "architecture": architecture}
                facts |= {"expected": TABLE[name].shared, "programs": launch.programs}
                print(json.dumps(facts | report), flush=True)


if __name__ == "__main__":
    main()
