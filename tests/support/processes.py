"""Tests whose work is done by several processes of torch.distributed, on the CPU with gloo."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.utils.deterministic

PATIENCE = timedelta(minutes=4)  # for a process that others wait for


def run(work, ranks, folder, *arguments) -> str:
    """Call work(*arguments), a function of a module, in each process; returns the failures that it lists, if any."""
    if ranks == 1:
        _process(0, 1, work, folder, arguments)
    else:
        processes.start_processes(_process, (ranks, work, folder, arguments), nprocs=ranks, start_method="spawn")
    return "\n".join(text for rank in range(ranks) if (text := (folder / f"report{rank}").read_text()))


def _process(rank, ranks, work, folder, arguments):
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    where = dict(init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    dist.init_process_group("gloo", timeout=PATIENCE, **where)
    try:
        failures = work(*arguments)
    finally:
        dist.destroy_process_group()
    (folder / f"report{rank}").write_text("\n".join(failures))
