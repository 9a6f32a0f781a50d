"""Named cases that all ranks run together, and what each of them found: the torchrun side and the pytest side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pvae
from pvae import module
from pvae.runtime.rank_agreement import RankError
from pvae.testing import lift_float32

Facts = dict[str, Any]
Case = Callable[[torch.device], Facts]
ROOT = Path(__file__).parents[2]


@contextmanager
def lifted() -> Iterator[None]:
    """Casts to float32 inside models are lifted, in all that `pvae.compile` compiles meanwhile."""
    compile_capture = module.compile_capture

    def lifting(captured: Any, *args: Any, **kwargs: Any) -> Any:
        lift_float32(captured.gm)
        return compile_capture(captured, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_capture", lifting)
        yield


def run_cases(cases: Mapping[str, Case], arguments: Sequence[str], seconds: float = 300.0) -> None:
    """One rank, under torchrun: `FOLDER DEVICE [CASE...]`, on cuda (NCCL) or cpu (gloo).

    A case may be named in part, and they run in the order named. Leaves in FOLDER what it found in each, as JSON: `{case:
    {"ok": ..., "text": ..., "seconds": ...}}`; rank 0 prints it too. `seconds` is how long ranks wait for each other.
    """
    folder, device_type, *wanted = arguments
    torch.set_num_threads(1)
    rank, device = int(os.environ["RANK"]), torch.device(device_type)
    if device_type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(seconds=seconds))
    found: dict[str, Facts] = {}
    for name in dict.fromkeys(name for part in wanted or [""] for name in cases if part in name):
        found[name] = _attempt(cases[name], device)
        if rank == 0:
            print(name, found[name], flush=True)
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _attempt(case: Case, device: torch.device) -> Facts:
    start = time.monotonic()
    try:
        facts = case(device)
    except Exception as error:
        if not isinstance(error, RankError):  # that another rank failed, which says so itself
            traceback.print_exc()
        facts = {"ok": False, "text": f"{type(error).__name__}: {error}"}
    pvae.reset()
    torch._dynamo.reset()
    return {**facts, "seconds": round(time.monotonic() - start, 1)}


def on_gpus(script: str, world: int, folder: Path) -> list[dict[str, Facts]]:
    """What each of so many ranks found in the cases of a module, such as `tests.gpu.shard_nccl`; skips without the GPUs."""
    if torch.cuda.device_count() < world:
        pytest.skip(f"fewer than {world} GPUs")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": paths}
    with open(folder / "log", "w") as log:
        command = [*torchrun, "-m", script, str(folder), "cuda"]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=1700, check=False, env=environment)
    files = [folder / f"{rank}.json" for rank in range(world)]
    assert all(file.exists() for file in files), (folder / "log").read_text()[-4000:]
    return [json.loads(file.read_text()) for file in files]


def assert_ok(ranks: Sequence[Mapping[str, Facts]], case: str) -> None:
    for found in ranks:
        assert case in found, "the ranks ended before they came to it"
        assert found[case]["ok"], found[case]["text"]
