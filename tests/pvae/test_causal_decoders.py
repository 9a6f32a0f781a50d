"""Real causal decoders: caches in lists and attributes, any number of frames by three graphs, resolutions, Dynamo's ways."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pvae

pytest.importorskip("diffusers")

from pvae.module import compiled_forwards
from pvae.testing import agreement
from pvae.tools.zoo import Case, load

EAGER = {"engine": "eager"}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def latents(frames: int, height: int = 4, width: int = 6, channels: int = 4) -> torch.Tensor:
    return torch.randn(1, channels, frames, height, width, generator=torch.Generator().manual_seed(frames))


def assert_right(case: Case, exact: Case, model: Any, x: torch.Tensor) -> None:
    found = agreement(case.run(model, (x,)), exact.run(inputs=(x.double(),)).float(), exact.run(inputs=(x.double(),)))
    assert found.error < 3e-6, str(found)


def test_wan_decodes_any_length_by_three_graphs() -> None:
    case = load("wan2.1")
    exact = case.cast(torch.float64)
    pvae.compile(case.model, **EAGER)
    counts = []
    for frames in (1, 2, 3, 4, 2, 1, 5):
        assert_right(case, exact, case.model, latents(frames))
        counts.append(len(pvae.report(case.model).graphs))
    assert counts == [1, 2, 3, 3, 3, 3, 3]
    (decoder,) = [f for f in compiled_forwards(case.model) if f.module is case.model.decoder]
    assert len(decoder.programs) == 3
    other = latents(3, 6, 4)
    assert_right(case, exact, case.model, other)
    assert len(pvae.report(case.model).graphs) == 6
    assert_right(case, exact, case.model, latents(3))
    assert_right(case, exact, case.model, other)
    assert len(pvae.report(case.model).graphs) == 6, "the first resolution again compiles nothing"


def test_wan_encodes_any_length() -> None:
    case = load("wan2.1", part="encode")
    exact = case.cast(torch.float64)
    pvae.compile(case.model, **EAGER)
    counts = []
    for frames in (1, 5, 9, 13, 5):
        assert_right(case, exact, case.model, torch.rand(1, 3, frames, 32, 48) * 2 - 1)
        counts.append(len(pvae.report(case.model).graphs))
    assert counts[2:] == [counts[1]] * 3 or counts[2:] == [counts[2]] * 3, counts
    assert counts[-1] <= 3


def test_the_caches_are_the_callers() -> None:
    case = load("wan2.1")
    twin = copy.deepcopy(case.model)
    pvae.compile(case.model, **EAGER)
    for model in (case.model, twin):
        model.clear_cache()
    for frame in latents(3).split(1, 2):
        kept = case.model._feat_map
        outs = []
        for model in (case.model, twin):
            model._conv_idx = [0]
            outs.append(model.decoder(frame, feat_cache=model._feat_map, feat_idx=model._conv_idx))
        assert case.model._feat_map is kept
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
        assert case.model._conv_idx == twin._conv_idx
        for ours, theirs in zip(case.model._feat_map, twin._feat_map, strict=True):
            if isinstance(theirs, torch.Tensor):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
                assert type(ours) is torch.Tensor
                assert ours.untyped_storage().nbytes() == ours.numel() * 4, "a cache must not keep an activation alive"
            else:
                assert ours == theirs


@pytest.mark.parametrize("name", ["magvit", "cogvideox"])
def test_attribute_caches(name: str) -> None:
    """Magvit keeps its caches as attributes that forward writes; a second clip starts afresh."""
    case = load(name)
    exact = case.cast(torch.float64)
    pvae.compile(case.model, strict="on", **EAGER)
    for _ in range(2):
        assert_right(case, exact, case.model, case.inputs[0])
    count = len(pvae.report(case.model).graphs)
    assert_right(case, exact, case.model, case.inputs[0].flip(-1))
    assert len(pvae.report(case.model).graphs) == count


def test_caches_in_a_returned_dict_stay_as_the_graph_computes_them() -> None:
    """CogVideoX's decoder returns them beside its result. Of nine frames, decoded as 3 + 2 + 2 + 2, the last two calls
    are of one kind; the second is given caches of three frames."""
    case = load("cogvideox")
    exact = case.cast(torch.float64)
    pvae.compile(case.model, conv3d="taps", norm_act="on", **EAGER)
    (decoder,) = [f for f in compiled_forwards(case.model) if f.module is case.model.decoder]
    seen: list[dict[str, Any]] = []
    case.model.decoder.register_forward_hook(lambda module, args, result: seen.append(result[1]))
    assert_right(case, exact, case.model, latents(9))
    assert len(decoder.programs) == 3 and len(seen) == 4
    for caches in seen:
        cache = caches["conv_out"]
        assert cache.is_contiguous(memory_format=torch.channels_last_3d) and not cache.is_contiguous()
        assert caches["norm_out"]["conv_y"].is_contiguous()  # of the latents, which are


def test_cosmos_negative_bases_by_torch_compile() -> None:
    """FX's generated code turns (-1) ** x into -(1 ** x), and Cosmos' wavelets with it."""
    case = load("cosmos")
    exact = case.cast(torch.float64)
    model = copy.deepcopy(case.model)
    model.decoder = torch.compile(model.decoder, backend="pvae", options=EAGER)
    found = agreement(case.run(model), case.run(), exact.run())
    assert found.ok, str(found)


def wan_by_dynamo(limit: int, engine: str = "eager") -> tuple[list[str], pvae.ModelReport]:
    case = load("wan2.1")
    exact = case.cast(torch.float64)
    case.model.decoder = torch.compile(case.model.decoder, backend="pvae", options={"engine": engine})
    patch: Any = torch._dynamo.config.patch
    with patch(recompile_limit=limit), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for frames in (4, 2):
            assert_right(case, exact, case.model, latents(frames))
    return [str(w.message) for w in caught if isinstance(w.message, pvae.PvaeWarning)], pvae.report(case.model)


@pytest.mark.slow
def test_wan_by_torch_compile_is_right() -> None:
    wan_by_dynamo(64)


def test_wan_by_torch_compile_beyond_the_recompile_limit() -> None:
    """Right all the same, with exactly one warning for each function that Dynamo gave up, and the way out named."""
    texts, report = wan_by_dynamo(1)
    assert texts and len(set(texts)) == len(texts)
    decoder = [t for t in texts if "WanDecoder3d.forward" in t]
    assert len(decoder) == 1 and "pvae.compile(model)" in decoder[0]
    assert any("WanDecoder3d.forward" in note and "pvae.compile(model)" in note for note in report.notes)
