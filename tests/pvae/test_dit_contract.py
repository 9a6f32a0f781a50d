"""Every transformer of the zoo with its modulation chains fused: within the contract, and as docs/coverage.md says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch.overrides import TorchFunctionMode

from pvae import compile as pvae_compile
from pvae.module import restore
from pvae.testing import agreement
from pvae.tools.coverage import cover
from pvae.tools.zoo import load, names

TABLE = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text()
FUSED = {"engine": "eager", "modulation": "on"}


def test_the_table_is_of_this_zoo() -> None:
    rows = re.findall(r"^\| (\S+) \| \w+ \| (?:forward|graphs) ", TABLE, re.MULTILINE)
    assert rows == list(names("transformer"))
    chains, fused = map(int, re.search(r"classes: (\d+) chains, (\d+) fused", TABLE).groups())  # type: ignore[union-attr]
    assert fused >= 0.95 * chains


def in_half_and_single() -> Iterator[tuple[str, tuple[torch.dtype, ...]]]:
    """Each model in float32, which is the table's, and every other one in bfloat16 too: all of them in the profile `deep`."""
    every = settings.default.max_examples >= 1000
    for i, name in enumerate(names("transformer")):
        yield name, (torch.float32, torch.bfloat16) if every or i % 2 else (torch.float32,)


@pytest.mark.parametrize(("name", "dtypes"), list(in_half_and_single()), ids=str)
def test_half_and_single(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        case = load(name, dtype=dtype)
        eager, reference = case.run(), case.cast(torch.float64).run()
        found = cover(case, FUSED)
        close = agreement(found.output, eager, reference)
        assert close.ok, str(close)
        if dtype is torch.float32:
            counts = f"{found.chains} | {found.fused} | {sum(found.refused.values())} | {len(found.unseen)} |"
            row = f"| {name} | {found.cls} | {found.scope} | {counts}"
            assert row in TABLE, f"docs/coverage.md is old (pvae coverage --out docs/coverage.md): {row}"


@pytest.mark.parametrize("name", ("wan2.1-dit", "wan2.2-ti2v-dit", "kandinsky6-dit", "krea2-dit", "joyimage-edit-dit"))
def test_as_published_weights_are_loaded(name: str) -> None:
    """diffusers keeps some modules in float32 in a half-precision model: norms, modulation, tables."""
    case = load(name, dtype=torch.bfloat16)
    chains = cover(case, FUSED).chains
    kept = set(case.model._keep_in_fp32_modules)
    for path, tensor in (*case.model.named_parameters(), *case.model.named_buffers()):
        if kept & set(path.split(".")) and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    eager, reference = case.run(), case.cast(torch.float64).run()
    found = cover(case, FUSED)
    close = agreement(found.output, eager, reference)
    assert close.ok, str(close)
    assert found.fused == found.chains == chains


class NoFloat32(TorchFunctionMode):
    """Casts to float32 go to float64: many norms are computed in float32 whatever the model's dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*wide, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@pytest.mark.parametrize("name", ("wan2.1-dit", "flux-dit", "qwen-image-edit-dit", "sd3.5-dit", "lumina-next-dit"))
def test_double(name: str) -> None:
    """To 1e-12, where rounding cannot hide a mistake."""
    case = load(name, dtype=torch.float64)
    with NoFloat32():
        eager = case.run()
        close = agreement(cover(case, FUSED).output, eager, eager)
    assert close.ok, str(close)


def test_capture_leaves_no_fake_tensors_in_the_models_caches() -> None:
    """Qwen-Image keeps its rotary table in an `lru_cache` within a closure: a second capture must not meet the first's."""
    case = load("qwen-image-dit", dtype=torch.float64)
    results = [case.run(pvae_compile(case.model, regions="whole", engine="eager")) for _ in range(2)]
    eager = case.run(restore(case.model))
    for result in results:
        torch.testing.assert_close(result, eager, rtol=1e-12, atol=1e-12)
