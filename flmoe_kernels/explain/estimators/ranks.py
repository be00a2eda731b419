"""Processes that share a run: one, or those of torch.distributed.

Every rank makes the same call and gets the same result. Only the evaluation of batches is shared; every rank
computes the same draws and sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flmoe_kernels.explain.games.coalitions import Floats


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of ranks; tensors are sent from `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, distributed: bool) -> Ranks:
        """Raises ValueError: distributed without a process group."""
        if not distributed:
            return cls()
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "distributed: expected an initialised process group (torchrun, and "
                "torch.distributed.init_process_group), got none"
            )
        nccl = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Floats) -> Floats:
        """Return the sum over ranks, which is exact if at most one rank has a nonzero value."""
        if self.size == 1:
            return values
        sent = self._send(torch.from_numpy(values))
        dist.all_reduce(sent)
        return sent.cpu().numpy()

    def agreed(self, values: Floats) -> Floats:
        """Return the numbers of the first rank, which other processors may round differently."""
        return self.total(values if self.first else np.zeros_like(values))

    def least(self, value: int) -> int:
        if self.size == 1:
            return value
        sent = self._send(torch.tensor(value))
        dist.all_reduce(sent, dist.ReduceOp.MIN)
        return int(sent)

    def require_same(self, name: str, digest: str) -> None:
        """Raise ValueError on every rank if the digests (hexadecimal) differ between ranks."""
        if self.size == 1:
            return
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.int64)
        low, high = self._send(mine), self._send(mine)
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise ValueError(f"{name}: expected the same on every rank, got different values")

    def from_first(self, content: bytes | None) -> bytes | None:
        """Return the content of the first rank, on every rank."""
        if self.size == 1:
            return content
        length = self._send(torch.tensor(-1 if content is None else len(content)))
        dist.broadcast(length, 0)
        if int(length) < 0:
            return None
        sent = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if self.first and content is not None:
            sent.copy_(torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()))
        dist.broadcast(sent, 0)
        return sent.cpu().numpy().tobytes()

    def _send(self, value: Tensor) -> Tensor:
        return value.to(self.device, copy=True)
