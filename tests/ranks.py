"""Ranks as threads of the test's own process, and as processes of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg


def on_threads(world: int, run: Callable[[int], Any]) -> list[Any]:
    """`run(rank)` on each rank of a world of threads."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threads_world = multi_threaded_pg._install_threaded_pg()
    store = dist.HashStore()

    def start(rank: int) -> Any:
        torch.set_num_threads(1)
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            return run(rank)
        except BaseException as error:  # the others wait in a collective: let them go
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)
            raise

    try:
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(start, range(world)))
    finally:
        del threads_world
        multi_threaded_pg.ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


def on_processes(commands: Sequence[Sequence[str]], seconds: float) -> None:
    """Start one process a rank and see that each ends well within so many seconds; what a failing one said is shown."""
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=seconds)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
