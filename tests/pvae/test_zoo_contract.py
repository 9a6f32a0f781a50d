"""The numerical contract on every model of the zoo, tiny, encode and decode."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import pvae

pytest.importorskip("diffusers")

from pvae.testing import Agreement, agreement
from pvae.tools.zoo import Case, load, names
from pvae.tools.zoo.load import ENTRIES

every_case = pytest.mark.parametrize(("name", "part"), [(n, p) for n in names() for p in ("decode", "encode")])
# Of each family one; LTX's norms and dc's of encoding round to float32 inside a float64 model.
TAPS_CASES = [
    *((n, "decode") for n in ("wan2.1", "qwen-image", "hunyuan-video", "cogvideox", "mochi", "kl", "dc", "tiny-kl")),
    *((n, "encode") for n in ("wan2.1", "qwen-image", "hunyuan-video", "cogvideox", "flux2")),
]
UNTOUCHED = ("kl", "flux2", "tiny-kl")  # by conv3d_unfold


def compare(case: Case, exact: torch.Tensor, **options: str) -> tuple[Agreement, pvae.ModelReport]:
    model = pvae.compile(copy.deepcopy(case.model), strict="on", **options)
    return agreement(case.run(model), case.run(), exact), pvae.report(model)


def narrow(name: str, part: str, dtype: torch.dtype) -> tuple[Case, torch.Tensor]:
    if (part, dtype) in ENTRIES[name].cpu_gaps:
        pytest.skip(f"torch has no {ENTRIES[name].cpu_gaps[part, dtype]} for {dtype} on the CPU")
    case = load(name, part=part, dtype=dtype)
    return case, case.cast(torch.float64).run()


def in_half_and_single() -> Iterator[tuple[str, str, torch.dtype]]:
    """(model, part, dtype): each model's parts in one dtype each, by turns; the profile `deep` takes both for both."""
    every = settings.default.max_examples >= 1000
    for i, name in enumerate(names()):
        for j, part in enumerate(("decode", "encode")):
            for k, dtype in enumerate((torch.float32, torch.bfloat16)):
                gap = (part, torch.bfloat16) in ENTRIES[name].cpu_gaps
                if every or ((i + j + k) % 2 == 0 if not gap else dtype is torch.float32):
                    yield name, part, dtype


@pytest.mark.parametrize(("name", "part", "dtype"), list(in_half_and_single()), ids=str)
def test_half_and_single(name: str, part: str, dtype: torch.dtype) -> None:
    """With every form of convolution that the rules choose on this device."""
    case, exact = narrow(name, part, dtype)
    found, _ = compare(case, exact, engine="eager")
    assert found.ok, str(found)


def is_exact(found: Agreement, name: str) -> bool:
    """AutoencoderDC computes its attention in float32 inside a float64 model: the last bit before it becomes one of float32."""
    return found.ok or (name == "dc" and found.error < 1e-6)


@every_case
def test_double_with_everything_unfolded(name: str, part: str) -> None:
    """Each rewrite forced, where rounding cannot hide a mistake."""
    form = "auto" if name.startswith("ltx") else "unfold2d"  # LTX's norms round to float32 inside a float64 model
    case = load(name, part=part, dtype=torch.float64)
    found, report = compare(case, case.run(), engine="eager", conv3d=form, weights="frozen")
    assert is_exact(found, name), str(found)
    assert (report.matches("conv3d_unfold") > 0) == (name not in UNTOUCHED) or form == "auto"


@pytest.mark.parametrize(("name", "part"), TAPS_CASES)
def test_double_with_taps(name: str, part: str) -> None:
    """Every convolution by `conv_taps`, with what stands around it; two more as a linear."""
    case = load(name, part=part, dtype=torch.float64)
    found, report = compare(case, case.run(), engine="eager", conv3d="taps")
    assert is_exact(found, name), str(found)
    assert report.matches("conv_taps") > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "qwen-image", "tiny-kl"])
def test_inductor(name: str) -> None:
    case, exact = narrow(name, "decode", torch.float32)
    found, _ = compare(case, exact, engine="inductor", conv3d="unfold2d")
    assert found.ok, str(found)
