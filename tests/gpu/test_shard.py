"""Sharded VAEs on real GPUs over NCCL, through torchrun with 2 and with 4 processes; `pytest -m gpu`.

The cases are in `shard_nccl.py`: halo over rows, columns and both, and patch, of three VAEs, tiny and at a middling size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from tests.gpu.shard_nccl import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module", params=[2, 4], ids="{} GPUs".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each case."""
    world: int = request.param
    if torch.cuda.device_count() < world:
        pytest.skip(f"fewer than {world} GPUs")
    folder = tmp_path_factory.mktemp(f"nccl{world}")
    script = Path(__file__).with_name("shard_nccl.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    with open(folder / "log", "w") as log:
        command = [*torchrun, str(script), str(folder), "cuda"]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=1700, check=False)
    files = [folder / f"{rank}.json" for rank in range(world)]
    assert all(file.exists() for file in files), (folder / "log").read_text()[-4000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("case", CASES)
def test_contract(ranks: list[dict[str, Any]], case: str) -> None:
    for found in ranks:
        assert case in found, "the ranks ended before they came to it"
        assert found[case]["ok"], found[case]["text"]
