"""Diffusion transformers with split tokens, and regions of rank 0, on real GPUs over NCCL, by torchrun over 2, 4 and all
GPUs; `pytest -m gpu`. The cases are in `sequence_nccl.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from tests.gpu.sequence_nccl import CASES

ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="fewer than 2 GPUs"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module", params=sorted({2, 4, GPUS - GPUS % 2} - {0}), ids="{} GPUs".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each case."""
    world: int = request.param
    if world > GPUS:
        pytest.skip(f"fewer than {world} GPUs")
    folder = tmp_path_factory.mktemp(f"sequence{world}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command = [*torchrun, "-m", "tests.gpu.sequence_nccl", str(folder), "cuda"]
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": paths}
    with open(folder / "log", "w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=1700, check=False, env=environment)
    files = [folder / f"{rank}.json" for rank in range(world)]
    assert all(file.exists() for file in files), (folder / "log").read_text()[-4000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("case", CASES)
def test_contract(ranks: list[dict[str, Any]], case: str) -> None:
    for found in ranks:
        assert case in found, "the ranks ended before they came to it"
        assert found[case]["ok"], found[case]["text"]
