"""Sharded VAEs on real GPUs over NCCL, through torchrun with 2 and with 4 processes; `pytest -m gpu`.

The cases are in `shard_nccl.py`: halo over rows, columns and both, and patch, of three VAEs, tiny and at a middling size.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from tests.gpu.cases import Facts, assert_ok, on_gpus
from tests.gpu.shard_nccl import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module", params=[2, 4], ids="{} GPUs".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Facts]]:
    """What each rank found in each case."""
    return on_gpus("tests.gpu.shard_nccl", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_contract(ranks: list[dict[str, Facts]], case: str) -> None:
    assert_ok(ranks, case)
