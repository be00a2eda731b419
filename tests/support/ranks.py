"""Processes of torch.distributed on the CPU."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# An hour, only against hangs: if a collective waits longer, a rank is lost; if a rank runs longer, it hangs.
HANG_SECONDS = 3600
Work = Callable[[int, int], Any]


def run_rank(rank: int, ranks: int, folder: str, work: Work) -> None:
    """Process of `start_ranks`; writes FOLDER/rank<rank>.pt."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    torch.set_num_threads(1)
    timeout = timedelta(seconds=HANG_SECONDS)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        torch.save(work(rank, ranks), f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of torch that are still running would abort the process at a normal exit


def start_ranks(ranks: int, folder: str, work: Work) -> list[Any]:
    """Results of work(rank, ranks) on all ranks.

    A failing rank stops all ranks; a hanging rank exits after a timeout.
    """
    mp.spawn(run_rank, args=(ranks, folder, work), nprocs=ranks)
    return [torch.load(f"{folder}/rank{r}.pt", weights_only=True) for r in range(ranks)]
