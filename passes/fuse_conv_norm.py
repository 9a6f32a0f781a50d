"""A norm over channels joins the convolution whose result it reads: `conv_taps` -> `channel_norm_act` -> `conv_taps_norm`.

    y = conv_taps(x, ...);  z = channel_norm_act(y, ...);  cache = z[:, :, -2:].clone()
        ->   y, z, cache = conv_taps_norm(x, ..., keep, 2)

Where one program of the convolution holds all channels of a position (kernels/conv_taps_norm.py), the norm costs its own
result's bytes and nothing else. What else reads the convolution, as a residual sum, gets it from the same launch, and so
does the next chunk its causal cache. A convolution of single frames that are then seen as a video becomes one of the video.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.kernels import conv_taps_norm as kernel
from pvae.kernels.channel_norm_act import OP as NORM
from pvae.kernels.conv_taps import OP as TAPS
from pvae.kernels.conv_taps_config import Config
from pvae.kernels.conv_taps_launch import NORMS, Call, Memory, NormCall, why_no_norm
from pvae.passes.ir import Builder, aten, known, static, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

NORM_ARGUMENTS = ("x", "weight", "bias", "norm", "eps", "factor", "activation", "padding", "mode", "scale", "shift")
NORM_DEFAULTS = {"factor": 1.0, "activation": "none", "padding": None, "mode": "constant", "scale": None, "shift": None}
TO_VIDEO = [0, 2, 1, 3, 4]  # [N, T, C, H, W] -> [N, C, T, H, W]
A_SIZE = 64  # for a symbolic one: whether there is a kernel does not depend on it


@dataclass(frozen=True)
class Site:
    """A convolution, what of it the norm reads, and what of the norm is the causal cache."""

    conv: Node
    source: Node  # the convolution, or the video that its frames are
    split: list[int] | None  # the frames as (samples, frames of each) of that video, -1 for what is symbolic
    norm: Mapping[str, Any]
    cache: Node | None
    tail: int  # frames of it

    @property
    def keep(self) -> bool:
        return len(self.source.users) > 1


class JoinNorm:
    """`channel_norm_act(conv_taps(...), w, b, ...)` -> the second result of `conv_taps_norm(...)`."""

    name = "conv_norm"

    def __init__(self, forced: bool) -> None:
        self.forced = forced

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target is not NORM:
            return None
        norm = {**NORM_DEFAULTS, **dict(zip(NORM_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        source = norm["x"]
        conv, split = (source, None) if source.target is TAPS else _frames(source)
        if conv is None:
            return None
        site = Site(conv, source, split, norm, *_cache(node))
        reason = self._why_not(site)
        if reason is not None:
            return Refusal(node, reason)
        parts = [f"{norm['norm']} norm"] + ([norm["activation"]] if norm["activation"] != "none" else [])
        parts += ["its argument"] if site.keep else []
        parts += [f"{site.tail} frames of cache"] if site.tail else []
        return Match(node, site, " + ".join(parts))

    def _why_not(self, site: Site) -> str | None:
        norm, activation = site.norm, site.conv.args[9]
        if norm["norm"] not in NORMS:
            return f"{norm['norm']} norm: it has a kernel of its own"
        if any(norm[name] is not None for name in ("padding", "scale", "shift")):
            return "it has a border, scale or shift"
        if activation != "none":
            return f"the convolution has an activation ({activation})"
        if any(_depends(norm[name], site.conv) for name in ("weight", "bias")):
            return "its weight depends on the convolution"
        return None if self.forced else why_no_norm(*_call(site))

    def rewrite(self, graph: Graph, match: Match) -> None:
        site: Site = match.facts
        conv, norm = site.conv, site.norm
        for name in ("weight", "bias"):
            _hoist(norm[name], conv)
        build = Builder(conv)
        x, before, weight, bias, residual, stride, padding, dilation, upsample, _, _ = conv.args
        if site.split is not None:
            x, residual = (_as_video(build, t, site.split) for t in (x, residual))
            weight = build(aten.unsqueeze.default, weight, 2)
            stride, padding, dilation = [1, *stride], [0, 0, *padding], [1, *dilation]
        both = build(
            kernel.OP, x, before, weight, bias, residual, stride, padding, dilation, upsample, _config(conv),
            *(norm[name] for name in NORM_ARGUMENTS[1:7]), site.keep, site.tail,
        )  # fmt: skip
        y, z, tail = (build(operator.getitem, both, i) for i in range(3))
        if site.cache is not None:
            site.cache.replace_all_uses_with(tail)
        Builder(match.node).replace(z)
        site.source.replace_all_uses_with(y)


def _frames(source: Node) -> tuple[Node | None, list[int] | None]:
    """The convolution whose single frames `source` shows as a video [N, C, T, H, W], and (N, T); or neither."""
    nothing = None, None
    if source.target is not aten.permute.default or list(source.args[1]) != TO_VIDEO:  # type: ignore[arg-type]
        return nothing
    frames = source.args[0]
    assert isinstance(frames, Node)
    if frames.target not in (aten.reshape.default, aten.view.default, aten.unflatten.int) or len(frames.users) != 1:
        return nothing
    conv = frames.args[0]
    assert isinstance(conv, Node)
    if conv.target is not TAPS or len(conv.users) != 1 or value(conv).dim() != 4 or value(frames).dim() != 5:
        return nothing
    same = all(known(a == b) for a, b in zip(value(frames).shape[2:], value(conv).shape[1:], strict=True))
    split = [-1 if static(size) is None else size for size in value(frames).shape[:2]]
    return (conv, split) if same and split != [-1, -1] else nothing


def _as_video(build: Builder, x: Node | None, split: list[int]) -> Node | None:
    if x is None:
        return None
    frames = build(aten.reshape.default, x, [*split, *(build.size(x, dim) for dim in (1, 2, 3))])
    video: Node = build(aten.permute.default, frames, TO_VIDEO)
    return video


def _cache(norm: Node) -> tuple[Node | None, int]:
    """The output that is a copy, or a view, of the norm's last frames and nothing else reads, and how many they are."""
    frames = static(value(norm).shape[2]) if value(norm).dim() == 5 else None
    for user in norm.users:
        count = None if frames is None else _last_frames(user, frames)
        if not count:
            continue
        last = user
        while len(last.users) == 1 and (reader := next(iter(last.users))).target is aten.clone.default:
            last = reader
        if [reader.op for reader in last.users] == ["output"]:
            return last, count
    return None, 0


def _last_frames(node: Node, frames: int) -> int | None:
    """How many of the last of `frames` frames `node` shows of its argument, if it shows nothing else."""
    if node.target is aten.clone.default:
        return frames
    if node.target is not aten.slice.Tensor:
        return None
    _, dim, start, _, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    if dim not in (2, -3) or step != 1 or not isinstance(start, int) or node.kwargs:
        return None
    start = max(start + frames, 0) if start < 0 else min(start, frames)
    count = static(value(node).shape[2])
    return count if count == frames - start else None


def _config(conv: Node) -> list[int]:
    """The convolution's config if a program of it holds all channels, else the kernel's own choice."""
    numbers: Any = conv.args[10]
    if not numbers:
        return []
    config = Config.of(numbers)
    fits = config.hopper and config.columns0 + config.columns1 == static(value(conv).shape[1])
    return list(numbers) if fits else []


def _call(site: Site) -> tuple[Call, list[int]]:
    """The call that the site becomes, as far as `why_no_norm` looks at it."""

    def sizes(node: Node) -> torch.Size:
        return torch.Size([A_SIZE if static(size) is None else size for size in value(node).shape])

    def memory(node: Any) -> Memory | None:
        return None if node is None else Memory(sizes(node), (), value(node).dtype, value(node).device)

    conv, norm = site.conv, site.norm
    x, weight = memory(conv.args[0]), memory(conv.args[2])
    assert x is not None and weight is not None
    stride, padding, dilation, upsample, activation, _ = conv.args[5:]
    epilogue = NormCall(
        None, None, norm["norm"], norm["eps"], norm["factor"], norm["activation"], site.keep, site.tail
    )
    call = Call(
        x, None, weight, None, None, tuple(stride), tuple(padding), tuple(dilation), upsample, activation,  # type: ignore[arg-type]
        tuple(_config(conv)), True, False, epilogue,
    )  # fmt: skip
    return call, list(sizes(conv))


def _depends(node: object, anchor: Node) -> bool:
    """Whether `node` is computed from `anchor`."""
    if not isinstance(node, Node) or node < anchor:
        return False
    return node is anchor or any(_depends(source, anchor) for source in node.all_input_nodes)


def _hoist(node: object, anchor: Node) -> None:
    """Move a norm's weight, and what it is made of, in front of `anchor`; what stands there already stays."""
    if not isinstance(node, Node) or node < anchor:
        return
    for source in node.all_input_nodes:
        _hoist(source, anchor)
    anchor.prepend(node)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [JoinNorm(settings.get("where") == "any")]


FUSE_CONV_NORM = Pass(
    name="fuse_conv_norm",
    summary="norms over channels in the convolutions that they read, where one program holds all channels",
    rules=_rules,
    options={"where": "auto|any"},
)
