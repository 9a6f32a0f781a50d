"""Cold and warm Inductor caches, and an edited source between two processes, give the same and the current answer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pvae.kernels
from pvae.cache_key import KeyPass, source_hash
from pvae.runtime.torch_compat import CustomGraphPass

ROOT = Path(pvae.kernels.__path__[0]).parent
PROGRAM = """
import torch, pvae
torch.manual_seed(0)
torch.set_grad_enabled(False)
model = torch.nn.Conv3d(2, 2, 3, padding=1)
x = torch.ones(1, 2, 3, 4, 4)
compiled = torch.compile(model, backend="pvae", options={"conv3d": "unfold2d", "expect": {"conv3d_unfold": 1}})
print("difference", (compiled(x) - model(x)).abs().max().item())
"""


def run(site: Path, cache: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", "import pvae.backend, torch._dynamo.backends.registry as r; "
         "r.register_backend(pvae.backend.pvae_backend, 'pvae') if 'pvae' not in r.list_backends() else None\n" + PROGRAM],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.slow
def test_cold_warm_and_edited(tmp_path: Path) -> None:
    site, cache = tmp_path / "site", tmp_path / "cache"
    shutil.copytree(ROOT / "pvae", site / "pvae", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("passes", "runtime", "kernels"):
        shutil.copytree(ROOT / name, site / "pvae" / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert run(site, cache) < 1e-5  # cold
    assert run(site, cache) < 1e-5  # warm
    kernel = site / "pvae" / "kernels" / "conv3d_unfold.py"
    text = kernel.read_text()
    assert "                return part\n" in text
    kernel.write_text(text.replace("                return part\n", "                return part + 1\n"))
    assert run(site, cache) == pytest.approx(1, abs=1e-4)  # the edit is seen
    kernel.write_text(text)
    assert run(site, cache) < 1e-5


def test_key_holds_sources_options_and_the_users_pass() -> None:
    class Inner(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            graph.lint()

        def uuid(self) -> str:
            return "inner"

    assert KeyPass("a").uuid() != KeyPass("b").uuid()
    assert source_hash() in KeyPass("a").uuid()
    assert KeyPass("a", Inner()).uuid() != KeyPass("a").uuid()
    assert KeyPass("a", lambda graph: None).uuid() is None
