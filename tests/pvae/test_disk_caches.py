"""Inductor's cache on disk: cold, warm, and after an edit of pvae's sources, the answer is that of the sources there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pvae
from pvae import cache_key
from pvae.cache_key import KeyPass, source_hash
from pvae.runtime.torch_compat import CustomGraphPass

ROOT = Path(pvae.__file__).resolve().parents[1]
SCRIPT = """
import torch, pvae
from torch._dynamo.utils import counters
torch.set_num_threads(1)
torch.manual_seed(0)
assert pvae.__file__.startswith(HOME), pvae.__file__
for channels, entry in ((4, "pvae.compile"), (5, "torch.compile")):  # of other sizes: one cannot hit what the other stored
    model = torch.nn.Sequential(torch.nn.Conv3d(channels, 4, 3, padding=1), torch.nn.SiLU())
    x = torch.randn(1, channels, 3, 5, 5)
    counters.clear()
    with torch.no_grad():
        expected = model(x)
        if entry == "pvae.compile":
            got = pvae.compile(model, conv3d="unfold2d")(x)
        else:
            got = torch.compile(model, backend="pvae", options={"conv3d": "unfold2d"})(x)
    print(f"{(got / expected).median().item():.3f}", counters["inductor"]["fxgraph_cache_hit"] > 0)
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package whose files may be edited."""
    home = tmp_path / "site"
    for folder, into in (("pvae", ""), *((name, name) for name in ("passes", "runtime", "kernels", "tools"))):
        target = home / "pvae" / into
        target.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / folder).glob("*.py"):
            (target / path.name).symlink_to(path)
    return home


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path} no longer has {old!r}"
    path.unlink()
    path.write_text(text.replace(old, new))


def run(home: Path, cache: Path) -> list[str]:
    """By `pvae.compile`, then by `torch.compile`: what comes back over what should, and whether the cache had it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PVAE_", "TORCHINDUCTOR_"))}
    environment |= {"PYTHONPATH": str(home), "PYTHONSAFEPATH": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    script = f"HOME = {str(home)!r}\n" + SCRIPT
    done = subprocess.run([sys.executable, "-c", script], cwd=home, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_cold_warm_and_edited(house: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(house, cache) == ["1.000 False"] * 2
    assert run(house, cache) == ["1.000 True"] * 2
    kernel = house / "pvae" / "kernels" / "conv3d_unfold.py"
    edit(kernel, "    t_step, h_step = _chunks(", "    return y.fill_(float('nan'))\n    t_step, h_step = _chunks(")
    assert run(house, cache) == ["nan False"] * 2, "an edited kernel is another key"


@pytest.fixture
def hashing(house: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`source_hash` of the copied package, computed anew at each call."""
    monkeypatch.setattr(pvae, "__path__", [str(house / "pvae")])
    for name in ("kernels", "passes", "runtime"):
        monkeypatch.setattr(getattr(pvae, name), "__path__", [str(house / "pvae" / name)])
    return source_hash.__wrapped__


@pytest.mark.parametrize(
    "path", ["backend.py", "kernels/conv3d_unfold.py", "passes/fold_pad.py", "runtime/frozen_weights.py"]
)
def test_source_hash_changes_with_any_source(house: Path, hashing: Any, path: str) -> None:
    before = hashing()
    assert before == hashing() and len(before) == 64
    source = house / "pvae" / path
    text = source.read_text()
    source.unlink()
    source.write_text(text + "# edited\n")
    assert hashing() != before
    source.write_text(text)
    assert hashing() == before


def test_source_hash_changes_with_torch(hashing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashing()
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert hashing() != before


class Inner(CustomGraphPass):
    def __init__(self, key: str) -> None:
        self.key = key
        self.seen: list[Any] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(graph)

    def uuid(self) -> str:
        return self.key


def test_key_pass_is_told_apart_by_everything_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [KeyPass("a").uuid(), KeyPass("b").uuid(), KeyPass("a", Inner("x")).uuid(), KeyPass("a", Inner("y")).uuid()]
    assert len(set(keys)) == 4 and KeyPass("a").uuid() == keys[0]
    monkeypatch.setattr(cache_key, "source_hash", lambda: "other sources")
    assert KeyPass("a").uuid() not in keys


def test_the_users_own_pass_still_runs() -> None:
    inner, graph = Inner("x"), torch.fx.Graph()
    KeyPass("a", inner)(graph)
    assert inner.seen == [graph]
    KeyPass("a")(graph)
    assert KeyPass("a", lambda graph: None).uuid() is None, "a plain function bypasses the cache, as without pvae"


@pytest.mark.slow
def test_a_users_pass_in_inductors_slot_is_kept() -> None:
    inner = Inner("mine")
    model = torch.nn.Conv2d(3, 3, 1)
    config: Any = torch._inductor.config
    with config.patch(post_grad_custom_post_pass=inner), torch.no_grad(), config.patch(fx_graph_cache=False):
        pvae.compile(model)(torch.randn(1, 3, 4, 4))
    assert len(inner.seen) == 1
