"""The zoo's transformers: every entry runs, uses all that it is given, and has the blocks that it says it has."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

pytest.importorskip("diffusers")

from pvae.tools.zoo import Case, load, names, parts
from pvae.tools.zoo.load import ENTRIES, TRANSFORMERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in version 1.0.0:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:Mismatch dtype between input and weight:UserWarning"
    ),  # diffusers' float32 norms
]
every_name = pytest.mark.parametrize("name", names("transformer"))

# What makes scale, shift and gate, in diffusers' names.
MODULATION = re.compile(
    r"scale_shift_table|modulat|adaln_single\.linear|time_proj\.weight|time_mod_proj|distilled_guidance_layer"
    r"|_mod\.\d|norm\w*\.linear(_\d)?\.",
    re.IGNORECASE,
)
# No modulation: a part of a U-Net.
WITHOUT_MODULATION = ("dreamlite-dit",)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def floats(case: Case) -> dict[str, torch.Tensor]:
    """The floating-point inputs, by their place among the keyword arguments."""
    leaves = tree_flatten_with_path(dict(case.kwargs))[0]
    return {keystr(p): v for p, v in leaves if isinstance(v, torch.Tensor) and v.is_floating_point()}


@every_name
def test_tiny_runs(name: str) -> None:
    before = torch.random.get_rng_state()
    case = load(name)
    assert torch.equal(before, torch.random.get_rng_state()), "loading must not disturb the global generator"
    output = case.run()
    assert output.isfinite().all() and not output.requires_grad
    assert 0.3 < output.std() < 5
    assert torch.equal(output, case.run()), "not deterministic"
    assert torch.equal(output, load(name).run()), "the seed does not decide"
    assert not torch.equal(output, load(name, seed=1).run())
    assert (case.part, case.regions, parts(name)) == ("forward", ("",), ("forward",))
    assert not case.model.training and not any(p.requires_grad for p in case.model.parameters())


@every_name
def test_other_dtypes(name: str) -> None:
    """A bfloat16 case must be near its float64 form, or rounding of a time or a position has made it another case."""
    single = load(name)
    exact = single.cast(torch.float64).run()
    assert exact.dtype == torch.float64
    assert (single.run() - exact).norm() < 1e-5 * exact.norm()
    half = load(name, dtype=torch.bfloat16)
    assert half.run().dtype == torch.bfloat16
    exact = half.cast(torch.float64).run()
    assert (half.run() - exact).norm() < 0.03 * exact.norm()


@every_name
def test_every_input_and_modulation_matters(name: str) -> None:
    case = load(name)
    inputs = {p: v for p, v in floats(case).items() if "rotary" not in p}  # CogVideoX writes rotated queries in place
    modulation = {k: p for k, p in case.model.named_parameters() if MODULATION.search(k)}
    assert bool(modulation) != (name in WITHOUT_MODULATION)
    read = inputs | {name: p.requires_grad_() for name, p in modulation.items()}
    for tensor in inputs.values():
        tensor.requires_grad_()
    case.call(case.model, case.inputs, case.kwargs).square().sum().backward()
    dead = [place for place, tensor in read.items() if tensor.grad is None or not tensor.grad.any()]
    assert not dead, "the output does not depend on them"


@every_name
def test_modulation_is_strong_enough_to_see(name: str) -> None:
    case, spreads = load(name), []
    for place, module in case.model.named_modules():
        if isinstance(module, nn.Linear) and MODULATION.search(f"{place}.weight"):
            module.register_forward_hook(lambda _module, _args, output: spreads.append(float(output.std())))
    case.run()
    assert all(0.1 < spread < 2 for spread in spreads), spreads
    tables = [float(p.std()) for k, p in case.model.named_parameters() if "table" in k and MODULATION.search(k)]
    assert all(0.05 < spread < 2 for spread in tables), tables


@every_name
def test_blocks(name: str) -> None:
    """At least one of each kind in full, two in tiny."""
    entry = TRANSFORMERS[name]
    full = load(name, preset="full", device="meta")
    for model, least in ((load(name).model, 2), (full.model, 1)):
        for path in entry.blocks:
            blocks = model.get_submodule(path)
            assert isinstance(blocks, nn.ModuleList) and len(blocks) >= least
    assert all(value.device.type == "meta" for value in floats(full).values())
    widths = [p.shape[0] for p in full.model.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in full.model.parameters()) > 10e6 and max(widths) >= 1024


@pytest.mark.parametrize(("name", "same"), [("qwen-image-edit-dit", True), ("qwen-image-dit", False)])
def test_qwen_image_selects_by_an_index(name: str, same: bool) -> None:
    """With `zero_cond_t` the tokens of the second picture do not know the time; without, all do."""
    case, seen = load(name), []

    def keep(_module: nn.Module, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["hidden_states"])

    case.model.get_submodule("transformer_blocks.0.attn").register_forward_pre_hook(keep, with_kwargs=True)
    case.run()
    times = {"timestep": floats(case)["['timestep']"] * 0.5}
    replace(case, kwargs={**case.kwargs, **times}).run()
    first, second = (pair.chunk(2, dim=1) for pair in seen)
    assert torch.equal(first[1], second[1]) == same
    assert not torch.equal(first[0], second[0])


def test_names() -> None:
    assert set(names("transformer")) == set(TRANSFORMERS) and set(names()) == set(ENTRIES)
    assert not set(TRANSFORMERS) & set(ENTRIES)
    assert len({entry.cls for entry in TRANSFORMERS.values()}) >= 30
    assert parts("wan2.1") == ("decode", "encode") == parts("diffusers:AutoencoderKL")
    assert parts("diffusers:FluxTransformer2DModel") == ("forward",) == parts("some.module:factory")


def test_class_in_the_zoo() -> None:
    found = load("diffusers:QwenImageTransformer2DModel", part="forward")
    assert torch.equal(found.run(), load("qwen-image-dit").run())


def test_size_is_in_latents() -> None:
    assert load("sd3-dit", size=(4, 6)).run().shape == (2, 4, 4, 6)
    assert load("flux-dit", size=(4, 6)).run().shape == (2, 6, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load("flux-dit", part="decode"), "unknown part of flux-dit 'decode'.*valid: forward"),
        (lambda: load("flux-dit", preset="huge"), "valid: tiny, full"),
        (lambda: load("flux-dits"), "did you mean flux-dit"),
        (lambda: load("sd3-dit", size=(1, 4, 6)), r"takes \(height, width\), in latents"),
        (lambda: load("sd3-dit", size=(0, 6)), r"takes \(height, width\), in latents"),
        (lambda: load("diffusers:UNet2DModel"), "not in the zoo and has no encode and decode"),
        (lambda: names("vae"), "valid: autoencoder, transformer"),
    ],
)
def test_bad_requests_name_good_ones(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
