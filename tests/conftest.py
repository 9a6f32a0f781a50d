"""What every test starts from: one thread, no memory of earlier compiles, no tuning store, hypothesis by profile (`ci` unless
told `deep`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import pvae

_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("ci", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("deep", max_examples=1000, print_blob=True, **_COMMON)
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of the session's own for what programs keep: the times of a developer's device decide nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """pvae's and Dynamo's memory is emptied before each test; the generator has a fixed seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pvae.reset()
    torch._dynamo.reset()
    yield


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws as it is imported is the same whichever modules were imported before it."""
    torch.manual_seed(0)
