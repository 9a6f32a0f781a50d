"""From a model's name to a `Case`: finding it, building it from a seed, making its inputs."""

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pvae.tools.zoo.case import Case, cast, forward
from pvae.tools.zoo.derive import derive_entry, latent_channels
from pvae.tools.zoo.entry import Entry, Unsupported
from pvae.tools.zoo.image import IMAGE
from pvae.tools.zoo.image_transformers import IMAGE_TRANSFORMERS
from pvae.tools.zoo.packed_transformers import PACKED_TRANSFORMERS
from pvae.tools.zoo.transformer import TransformerEntry, draw_weights
from pvae.tools.zoo.video import VIDEO
from pvae.tools.zoo.video_transformers import VIDEO_TRANSFORMERS
from pvae.tools.zoo.wan_transformers import WAN_TRANSFORMERS

ENTRIES: Mapping[str, Entry] = VIDEO | IMAGE
TRANSFORMERS: Mapping[str, TransformerEntry] = (
    WAN_TRANSFORMERS | VIDEO_TRANSFORMERS | PACKED_TRANSFORMERS | IMAGE_TRANSFORMERS
)
_NAMES = {"autoencoder": tuple(ENTRIES), "transformer": tuple(TRANSFORMERS)}
_PRESETS = ("tiny", "full")


def names(kind: str = "autoencoder") -> tuple[str, ...]:
    """The zoo's own names of a kind of model, `autoencoder` or `transformer`."""
    _check("kind of model", kind, tuple(_NAMES))
    return _NAMES[kind]


def parts(spec: str) -> tuple[str, ...]:
    """What can be loaded of `spec`, the default first."""
    classes = {entry.cls for entry in TRANSFORMERS.values()}
    if _is_factory(spec) or spec in TRANSFORMERS or spec.removeprefix("diffusers:") in classes:
        return ("forward",)
    return ("decode", "encode")


def load(
    spec: str,
    *,
    preset: str = "tiny",
    part: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    size: tuple[int, ...] | None = None,
) -> Case:
    """The model that `spec` names, with random weights and inputs that depend on `seed` alone.

    `spec` is a zoo name; `diffusers:ClassName` (the zoo's first entry of that class, else an autoencoder's default
    configuration); or `package.module:factory`, where `factory()` returns `module, args` or `module, args, kwargs`
    (`preset` and `size` are the factory's business). `part` is `decode` (the default) or `encode` of an autoencoder,
    `forward` of anything else. `size` is (frames, height, width) or (height, width): an autoencoder's in pixels, at
    batch 1; a transformer's in latents, before patches are made of them.

    Weights and inputs are drawn in float32 and then cast, on the CPU, so that they are the same for every dtype and
    device; `full` weights are drawn on a CUDA device itself, for speed, and so differ from the CPU's. The global random
    state is left as it was. Raises ValueError for what does not exist or does not fit, naming what does, and
    `Unsupported` where torch lacks an op.
    """
    device = torch.device(device)
    if _is_factory(spec):
        if part not in (None, "forward") or preset != "tiny" or size is not None:
            raise ValueError(f"{spec} is a factory: it has no other part than forward, no presets and no sizes")
        return _from_factory(spec, dtype, device, seed)
    _check("preset", preset, _PRESETS)
    entry = _find(spec)
    part = parts(spec)[0] if part is None else part
    _check(f"part of {spec}", part, parts(spec))
    if isinstance(entry, TransformerEntry):
        return transformer_case(spec, entry, preset, dtype, device, seed, size)
    if device.type == "cpu" and (part, dtype) in entry.cpu_gaps:
        raise Unsupported(
            f"torch has no {entry.cpu_gaps[part, dtype]} for {dtype} on the CPU, which {spec} {part} needs"
        )
    pixels, latents = entry.extents(spec, entry.preset(preset).size if size is None else tuple(size))
    draw = partial(_vary_constants, gain=entry.gain)
    model = _build(entry.cls, entry.preset(preset).config, draw, device, seed, direct=preset == "full")
    with _seeded(seed, torch.device("cpu")), torch.device("meta" if device.type == "meta" else "cpu"):
        if part == "decode":
            inputs = torch.randn(1, latent_channels(model), *latents)
        else:
            inputs = torch.rand(1, entry.channels, *pixels) * 2 - 1
    kwargs = {name: torch.tensor([value]) for name, value in entry.decode_kwargs.items()} if part == "decode" else {}
    return Case(
        name=spec,
        preset=preset,
        part=part,
        model=nn.Module.to(model, device, dtype),  # diffusers' own `to` warns of modules to keep in float32: none here
        inputs=cast((inputs,), dtype, device),
        kwargs=cast(kwargs, dtype, device),
        regions=(f"{part}r",),
        call=entry.calls[part],
    )


def _is_factory(spec: str) -> bool:
    return ":" in spec and not spec.startswith("diffusers:")


def transformer_case(
    spec: str,
    entry: TransformerEntry,
    preset: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    size: tuple[int, ...] | None,
) -> Case:
    """A case of an entry, which may be none of the zoo's own (a bench with other inputs or more blocks)."""
    sizes = entry.sizes(preset) if size is None else entry.sizes(preset).resized(spec, tuple(size))
    model = _build(entry.cls, entry.config(preset), draw_weights, device, seed, direct=preset == "full")
    with _seeded(seed, torch.device("cpu")), torch.device("meta" if device.type == "meta" else "cpu"):
        kwargs = entry.inputs(model, sizes)
    return Case(
        name=spec,
        preset=preset,
        part="forward",
        model=nn.Module.to(model, device, dtype),
        inputs=(),
        kwargs=cast(kwargs, dtype, device),
        regions=("",),
        call=entry.call,
    )


def _find(spec: str) -> Entry | TransformerEntry:
    entries: Mapping[str, Entry | TransformerEntry] = {**ENTRIES, **TRANSFORMERS}
    if not spec.startswith("diffusers:"):
        _check("model", spec, tuple(entries), "; or give diffusers:ClassName or package.module:factory")
        return entries[spec]
    wanted = spec.removeprefix("diffusers:")
    known = [entry for entry in entries.values() if entry.cls == wanted]
    if known:
        return known[0]
    found: Any = _diffusers_class(wanted)
    if not (hasattr(found, "encode") and hasattr(found, "decode")):
        raise ValueError(
            f"diffusers:{wanted} is not in the zoo and has no encode and decode; give a package.module:factory for it"
        )
    return derive_entry(found)


def _diffusers_class(name: str) -> type:
    try:
        diffusers = importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the zoo's models come from diffusers: pip install 'pvae[models]'") from error
    autoencoders = tuple(name for name in dir(diffusers) if name.startswith("Autoencoder") or name == "VQModel")
    found: Any = getattr(diffusers, name, None)
    if not isinstance(found, type):
        _check("diffusers class", name, autoencoders)
    return found


def _check(what: str, value: str, valid: Sequence[str], more: str = "") -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown {what} {value!r}{hint}; valid: {', '.join(valid)}{more}")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators seeded inside and as before outside; CUDA's only where they are drawn from."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_cuda else ()):
        (torch.manual_seed if on_cuda else torch.default_generator.manual_seed)(seed)
        yield


def _build(
    cls_name: str,
    config: Mapping[str, object],
    draw: Callable[[nn.Module], None],
    device: torch.device,
    seed: int,
    *,
    direct: bool,
) -> nn.Module:
    """The model in float32 and eval mode, no parameter asking for gradients; `direct`: on a CUDA device from the start.

    `draw` changes the weights that the class starts with.
    """
    cls: Any = _diffusers_class(cls_name)
    where = device if device.type == "meta" or (device.type == "cuda" and direct) else torch.device("cpu")
    with _seeded(seed, where), torch.no_grad(), where:
        model: nn.Module = cls(**config)
        if where.type != "meta":
            draw(model)
    return model.eval().requires_grad_(False)


def _vary_constants(model: nn.Module, gain: float) -> None:
    """Noise on what starts as all ones or zeros (norms' weights and biases), which would hide a rewrite that drops it;
    `gain` on the convolutions."""
    for parameter in model.parameters():
        if parameter.ndim and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if parameter.ndim >= 4:
            parameter.mul_(gain)


def _from_factory(spec: str, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    path, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise ValueError(f"{spec}: there is no module {error.name!r} on the import path") from error
    factory: Any = getattr(module, attribute, None)
    if not callable(factory):
        public = tuple(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        _check(f"factory in {path}", attribute, public)
    with _seeded(seed, device):
        made = factory()
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise TypeError(f"{spec}() must return (module, args) or (module, args, kwargs)")
    model, args, kwargs = made if len(made) == 3 else (*made, {})
    if not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        raise TypeError(f"{spec}() must return args as a tuple or list and kwargs as a mapping")
    return Case(
        name=spec,
        preset="tiny",
        part="forward",
        model=nn.Module.to(model, device, dtype).eval().requires_grad_(False),
        inputs=cast(tuple(args), dtype, device),
        kwargs=cast(dict(kwargs), dtype, device),
        regions=("",),
        call=forward,
    )
