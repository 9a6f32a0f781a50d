"""Ranks as threads of the test's own process, and as processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
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


def on_forks(*ranks: Callable[[], None]) -> int:
    """Each in a process of its own, a fork of this one, so that what this one has imported is imported once. Returns how many
    did not end well."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(process.exitcode != 0 for process in processes)


def run_script(script: Path, *arguments: str, seconds: float) -> None:
    """Run a script that forks its ranks; all of them are gone after so many seconds. What they said is shown if it fails."""
    paths = (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1]))  # scripts import from `tests`
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        assert process.returncode == 0, said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
