"""Diffusion transformers with split tokens, and regions of rank 0, on real GPUs over NCCL, by torchrun over 2, 4 and all
GPUs; `pytest -m gpu`. The cases are in `sequence_nccl.py`.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from tests.gpu.cases import Facts, assert_ok, on_gpus
from tests.gpu.sequence_nccl import CASES

GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="fewer than 2 GPUs"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module", params=sorted({2, 4, GPUS - GPUS % 2} - {0}), ids="{} GPUs".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Facts]]:
    """What each rank found in each case."""
    return on_gpus("tests.gpu.sequence_nccl", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_contract(ranks: list[dict[str, Facts]], case: str) -> None:
    assert_ok(ranks, case)
