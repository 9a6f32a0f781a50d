"""The zoo: every entry runs in every form it is offered in, is what it says it is, and bad requests name good ones."""

import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from pvae.tools.zoo import Case, Unsupported, load, names
from pvae.tools.zoo.derive import latent_channels
from pvae.tools.zoo.load import ENTRIES

PARTS = ("decode", "encode")
every_case = pytest.mark.parametrize(("name", "part"), [(name, part) for name in names() for part in PARTS])

# Encoders that give latents; the others give a mean and a log variance.
NO_VARIANCE = ("AutoencoderKLCosmos", "AutoencoderDC", "AutoencoderTiny")

# Millions of parameters of the published models.
FULL_MILLIONS = {
    "wan2.1": 127,
    "wan2.2": 705,
    "qwen-image": 127,
    "hunyuan-video": 246,
    "hunyuan-video-1.5": 1261,
    "ltx-video": 419,
    "ltx-video-0.9.5": 1246,
    "ltx2-video": 1223,
    "cogvideox": 216,
    "mochi": 460,
    "magvit": 244,
    "allegro": 175,
    "cosmos": 106,
    "kl": 84,
    "flux2": 84,
    "dc": 312,
    "tiny-kl": 2.4,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expected_shape(case: Case) -> tuple[int, ...]:
    entry = ENTRIES[case.name]
    pixels, latents = entry.extents(case.name, entry.preset(case.preset).size)
    if case.part == "decode":
        return (1, 3, *pixels)
    statistics = 1 if entry.cls in NO_VARIANCE else 2
    return (1, statistics * latent_channels(case.model), *latents)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_runs(name: str, part: str, dtype: torch.dtype) -> None:
    if (part, dtype) in ENTRIES[name].cpu_gaps:
        with pytest.raises(Unsupported, match="avg_pool3d"):
            load(name, part=part, dtype=dtype)
        return
    case = load(name, part=part, dtype=dtype)
    output = case.run()
    assert output.dtype == dtype and not output.requires_grad
    assert tuple(output.shape) == expected_shape(case)
    assert output.isfinite().all()
    assert 0.05 < output.float().std() < 5
    assert (output.float().abs() == 1).float().mean() < 0.1, "clamped nearly everywhere"
    assert torch.equal(output, case.run()), "not deterministic"
    for region in case.regions:
        assert sum(p.numel() for p in case.model.get_submodule(region).parameters()) > 1000
    assert not case.model.training and not any(p.requires_grad for p in case.model.parameters())


@every_case
def test_full_is_the_published_size(name: str, part: str) -> None:
    case = load(name, preset="full", part=part, device="meta")
    millions = sum(p.numel() for p in case.model.parameters()) / 1e6
    assert millions == pytest.approx(FULL_MILLIONS[name], rel=0.02)
    assert tuple(case.run().shape) == expected_shape(case)


def test_video_has_steady_chunks() -> None:
    for name in names():
        latents = load(name, device="meta").inputs[0].shape
        assert latents[-2] != latents[-1], "a square hides swapped axes"
        assert len(latents) == 4 or name == "qwen-image" or latents[2] >= 3


def test_the_seed_decides() -> None:
    before = torch.random.get_rng_state()
    first, again, other = load("wan2.1"), load("wan2.1"), load("wan2.1", seed=1)
    assert torch.equal(before, torch.random.get_rng_state()), "loading must not disturb the global generator"
    weights = [case.model.state_dict() for case in (first, again, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not any(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])
    assert torch.equal(first.inputs[0], again.inputs[0]) and not torch.equal(first.inputs[0], other.inputs[0])


def test_dtypes_share_weights() -> None:
    narrow, wide = (load("kl", dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    for low, high in zip(narrow.model.parameters(), wide.model.parameters(), strict=True):
        assert torch.equal(low, high.to(torch.bfloat16))
    assert torch.equal(narrow.inputs[0], wide.inputs[0].to(torch.bfloat16))


def test_cast_keeps_the_rounded_weights() -> None:
    narrow = load("ltx-video-0.9.5", dtype=torch.bfloat16)
    reference = narrow.cast(torch.float64)
    for low, high in zip(narrow.model.parameters(), reference.model.parameters(), strict=True):
        assert low.dtype == torch.bfloat16 and torch.equal(low.double(), high)
    temb = reference.kwargs["temb"]
    assert isinstance(temb, torch.Tensor) and temb.dtype == torch.float64
    exact = reference.run()
    assert (narrow.run() - exact).norm() < 0.05 * exact.norm()


def test_run_takes_another_model_and_other_inputs() -> None:
    case = load("kl")
    assert torch.equal(case.run(load("kl", seed=1).model), load("kl", seed=1).run(inputs=case.inputs))
    assert case.run(inputs=(torch.zeros(2, 4, 3, 5),)).shape == (2, 3, 24, 40)


def test_size_is_in_pixels() -> None:
    assert load("wan2.1", size=(5, 40, 16)).inputs[0].shape == (1, 4, 2, 5, 2)
    assert load("wan2.1", size=(40, 16)).inputs[0].shape == (1, 4, 1, 5, 2)
    assert load("mochi", size=(7, 16, 8), part="encode").inputs[0].shape == (1, 3, 7, 16, 8)
    assert load("allegro", size=(8, 16, 8)).inputs[0].shape == (1, 4, 2, 2, 1)
    assert load("dc", size=(64, 32)).inputs[0].shape == (1, 8, 2, 1)


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("wan2.1", (14, 32, 48), r"4k\+1 frames \(1, 5, 9"),
        ("wan2.1", (13, 33, 48), "multiples of 8"),
        ("wan2.1", (13, 0, 48), "multiples of 8"),
        ("wan2.1", (32,), r"\(frames, height, width\)"),
        ("mochi", (12, 32, 48), r"6k\+1 frames \(1, 7, 13"),
        ("allegro", (9, 32, 48), r"4k frames \(4, 8, 12"),
        ("allegro", (32, 48), r"4k frames \(4, 8, 12"),
        ("kl", (1, 32, 48), r"takes \(height, width\)"),
        ("dc", (48, 64), "multiples of 32"),
    ],
)
def test_bad_size(name: str, size: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(name, size=size)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")  # Oobleck's
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load("wan21"), r"did you mean wan2\.1\?.*valid: wan2\.1, .*diffusers:ClassName"),
        (lambda: load("kl", preset="huge"), "unknown preset 'huge'; valid: tiny, full"),
        (lambda: load("kl", part="decoder"), r"did you mean decode\?"),
        (lambda: load("diffusers:AutoencoderKLWam"), r"did you mean AutoencoderKLWan\?"),
        (lambda: load("diffusers:UNet2DModel"), "no encode and decode"),
        (lambda: load("diffusers:AutoencoderKLTemporalDecoder"), "missing values for num_frames of decode"),
        (lambda: load("diffusers:AutoencoderKLHunyuanImage"), "missing defaults of its constructor's in_channels"),
        (lambda: load("diffusers:AutoencoderOobleck"), "missing spatial_compression_ratio"),
        (lambda: load("diffusers:AutoencoderKLHunyuanImageRefiner"), r"gives \(3, 64, 96\) where \(9, 64, 96\)"),
        (lambda: load("no.such:factory"), "no module 'no'"),
        (lambda: load("collections:factory"), "unknown factory in collections 'factory'"),
        (lambda: load("zoo_models:block", part="encode"), "no other part than forward"),
        (lambda: load("zoo_models:block", size=(8, 8)), "no sizes"),
    ],
)
def test_bad_requests_name_good_ones(call: Callable[[], Case], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_class_in_the_zoo() -> None:
    assert torch.equal(load("diffusers:AutoencoderTiny").run(), load("tiny-kl").run())


def test_class_outside_the_zoo() -> None:
    case = load("diffusers:AsymmetricAutoencoderKL", part="encode")
    assert case.inputs[0].shape == (1, 3, 4, 6)
    assert case.run().shape == (1, 8, 4, 6)
    assert load("diffusers:AsymmetricAutoencoderKL", size=(8, 16)).run().shape == (1, 3, 8, 16)


@pytest.fixture
def zoo_models(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("zoo_models")
    monkeypatch.setitem(sys.modules, "zoo_models", module)
    return module


def test_factory(zoo_models: types.ModuleType) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, keep: torch.Tensor, *, gain: float = 1.0) -> tuple[torch.Tensor, None]:
            return self.linear(x[keep]) * gain, None

    keep = torch.tensor([0, 2])
    zoo_models.block = lambda: (Block(), (torch.ones(3, 4), keep), {"gain": 2.0})  # type: ignore[attr-defined]
    case = load("zoo_models:block", dtype=torch.bfloat16)
    assert (case.part, case.regions, case.kwargs) == ("forward", ("",), {"gain": 2.0})
    assert case.inputs[0].dtype == torch.bfloat16 and case.inputs[1].dtype == torch.int64
    assert case.run().shape == (2, 4) and case.run().dtype == torch.bfloat16
    assert torch.equal(case.run(), load("zoo_models:block", dtype=torch.bfloat16).run())
    assert not torch.equal(case.run(), load("zoo_models:block", dtype=torch.bfloat16, seed=1).run())


def test_every_run_has_lists_of_its_own(zoo_models: types.ModuleType) -> None:
    class Causal(nn.Module):
        def forward(self, x: torch.Tensor, caches: list[torch.Tensor | None], *, more: dict[str, int]) -> torch.Tensor:
            before, caches[0] = caches[0], x
            more["calls"] = more.get("calls", 0) + 1
            return x * more["calls"] if before is None else x + before

    zoo_models.causal = lambda: (Causal(), (torch.ones(2), [None]), {"more": {}})  # type: ignore[attr-defined]
    case = load("zoo_models:causal")
    assert torch.equal(case.run(), case.run()) and torch.equal(case.run(), case.cast(torch.float64).run().float())


def test_factory_that_returns_something_else(zoo_models: types.ModuleType) -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            return None

    zoo_models.alone = lambda: nn.Linear(1, 1)  # type: ignore[attr-defined]
    zoo_models.bare = lambda: (nn.Linear(1, 1), torch.ones(1, 1))  # type: ignore[attr-defined]
    zoo_models.none = lambda: (Nothing(), (torch.ones(1, 1),))  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"must return \(module, args\)"):
        load("zoo_models:alone")
    with pytest.raises(TypeError, match="args as a tuple or list"):
        load("zoo_models:bare")
    with pytest.raises(TypeError, match="Nothing returned NoneType"):
        load("zoo_models:none").run()
