"""What users need to test a model, or a pass of their own: the numerical contract, graphs in and out, random models.

    from pvae.testing import assert_equivalent
    assert_equivalent(model, (x,), options={"conv3d": "unfold2d"})

The strategies need hypothesis (`pip install pvae[testing]`); the rest does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pvae.capture import Capture, capture_run
from pvae.module import compile, restore
from pvae.options import parse_options
from pvae.passes import dump
from pvae.passes.ir import Builder, derive
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context, Report, RewriteCounter
from pvae.runtime.torch_compat import new_fake_mode, static_fake

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

EXACT_RATIO = 1.25
FLOAT64_BOUND = 1e-12


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||, both taken to float64; NaN where out is not finite but reference is."""
    if out.shape != reference.shape:
        raise AssertionError(f"shapes differ: {tuple(out.shape)} and {tuple(reference.shape)}")
    wide = torch.complex128 if reference.is_complex() else torch.float64
    difference = torch.linalg.vector_norm(out.to(wide) - reference.to(wide)).item()
    size = torch.linalg.vector_norm(reference.to(wide)).item()
    return difference / size if size else difference


@dataclass(frozen=True)
class Agreement:
    """A rewrite's error against float64 beside eager's own, and what the contract allows."""

    dtype: torch.dtype
    error: float
    eager_error: float
    elements: int

    @property
    def bound(self) -> float:
        """float64: 1e-12. Else 1.25 times eager's error, or one rounding of the output where eager makes none.

        An error over few elements is a noisy estimate: below 4096 of them the bound grows, to five times as much for 4.
        """
        if self.dtype in (torch.float64, torch.complex128):
            return FLOAT64_BOUND
        floor = torch.finfo(self.dtype).eps / 2 if self.dtype.is_floating_point else 0.0
        noise = 1 + max(0.0, 8 / max(self.elements, 1) ** 0.5 - 8 / 64)
        return noise * max(EXACT_RATIO * self.eager_error, floor)

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def __str__(self) -> str:
        verdict = "within" if self.ok else "beyond"
        return (
            f"{str(self.dtype).removeprefix('torch.')}: error {self.error:.2e}, eager's {self.eager_error:.2e}, "
            f"{verdict} the bound of {self.bound:.2e}"
        )


def agreement(out: Any, eager: Any, reference: Any) -> Agreement:
    """Compare outputs (tensors, or matching trees of them) with a float64 reference; the worst leaf counts."""
    leaves = [[t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, Tensor)] for x in (out, eager, reference)]
    if len({len(group) for group in leaves}) != 1:
        raise AssertionError(f"{len(leaves[0])} tensors came back, eager returns {len(leaves[1])}")
    for ours, theirs in zip(leaves[0], leaves[1], strict=True):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            raise AssertionError(f"got {ours.dtype} {tuple(ours.shape)}, eager {theirs.dtype} {tuple(theirs.shape)}")
    found = [
        Agreement(o.dtype, relative_error(o, r), relative_error(e, r), o.numel())
        for o, e, r in zip(*leaves, strict=True)
    ]
    return max(found, key=lambda a: (not a.ok, a.error / a.bound if a.bound else a.error))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value


def assert_equivalent(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    options: Mapping[str, Any] | None = None,
    call: Callable[..., Any] | None = None,
) -> list[Agreement]:
    """Check that `pvae.compile(model, **options)` keeps the contract on `model(*args, **kwargs)`, for each dtype.

    The model and arguments are copied and cast; the reference is the eager model in float64 on the same values.
    `call(model, *args, **kwargs)` replaces the plain call. `options` default to `engine="eager"`. Raises AssertionError.
    """
    options = {"engine": "eager", **(options or {})}
    call = call or (lambda m, *a, **k: m(*a, **k))
    results: list[Agreement] = []
    with torch.no_grad():
        for dtype in dtypes:
            narrow = copy.deepcopy(restore(model)).to(dtype)
            values = _cast((tuple(args), dict(kwargs or {})), dtype)

            def run(m: nn.Module, wide: torch.dtype = dtype, values: Any = values) -> Any:
                a, k = _cast(values, wide)
                return call(m, *a, **k)

            reference = run(copy.deepcopy(narrow).to(torch.float64), torch.float64)
            eager = run(narrow)
            found = agreement(run(compile(narrow, **options)), eager, reference)
            if not found.ok:
                raise AssertionError(str(found))
            results.append(found)
    return results


def capture(function: Callable[..., Any], *args: Tensor) -> Capture:
    """The IR of `function(*args)`; every argument is an input and none a weight."""
    mode = new_fake_mode()

    def run(*flat: Tensor) -> list[Any]:
        return list(torch.utils._pytree.tree_leaves(function(*flat), is_leaf=lambda x: x is None))

    return capture_run(run, [static_fake(mode, a) for a in args], (), mode)


def rewrite(
    function: Callable[..., Any], *args: Tensor, passes: str, options: Mapping[str, Any] | None = None
) -> tuple[GraphModule, list[Report]]:
    """Capture `function(*args)` and run the pipeline `passes` on it, verified."""
    captured = capture(function, *args)
    parsed = parse_options(options, {})
    context = Context(parsed, counter=RewriteCounter(parsed.rewrite_limit))
    reports = run_pipeline(captured.gm, Pipeline.parse(passes), context)
    return captured.gm, reports


def structure(gm: GraphModule) -> list[str]:
    """A graph as comparable text: targets and arguments with nodes numbered, no names, no dead code."""
    gm.graph.eliminate_dead_code()
    numbers = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return numbers[value]
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    lines = []
    for node in gm.graph.nodes:
        target = "" if node.op in ("placeholder", "output") else dump._target(node)
        keywords = {k: plain(v) for k, v in node.kwargs.items()}
        lines.append(
            f"{node.op} {target} {plain(node.args) if node.op != 'placeholder' else ''} {keywords or ''}".strip()
        )
    return lines


def assert_rewrites_to(
    before: Callable[..., Any],
    expected: Callable[..., Any],
    *args: Tensor,
    passes: str,
    options: Mapping[str, Any] | None = None,
) -> list[Report]:
    """Check that `passes` turn the graph of `before` into the graph of `expected`, node by node. Returns the reports.

    `expected` is written in the ops of the IR (`torch.ops.aten.conv3d.default(...)`), every argument as the pass leaves
    it, and returns a tuple. It is taken as it stands: capturing it would spell `reshape`, `to` and `contiguous` anew.
    """
    gm, reports = rewrite(before, *args, passes=passes, options=options)
    got, want = structure(gm), structure(torch.fx.symbolic_trace(expected))
    if got != want:
        raise AssertionError("rewritten to:\n" + "\n".join(got) + "\nexpected:\n" + "\n".join(want))
    return reports


def lift_float32(gm: GraphModule) -> int:
    """Where a float64 graph casts to float32 and computes in that, have it stay in float64; returns how many casts.

    Some models compute a norm or an attention in float32 whatever they are given. Its rounding, 1e-7, would hide what a
    float64 comparison is to show. Only what depends on such a cast changes: constants and masks that are float32 from the
    start stay so, but for a copy where they are multiplied as matrices. In place; the metas are derived anew.
    """
    lifted: set[Node] = set()
    casts = 0
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            if lifted.intersection(node.all_input_nodes):
                gm.graph.erase_node(node)
            continue
        if node.op != "call_function":
            continue
        given = [getattr(n.meta.get("val"), "dtype", None) for n in node.all_input_nodes]
        if torch.float64 in given and torch.float32 in torch.utils._pytree.tree_leaves((node.args, node.kwargs)):
            wide = torch.fx.node.map_aggregate(
                (node.args, node.kwargs), lambda leaf: torch.float64 if leaf is torch.float32 else leaf
            )
            node.args, node.kwargs = wide
            casts += 1
        elif not lifted.intersection(node.all_input_nodes):
            continue
        elif torch.Tag.pointwise not in getattr(node.target, "tags", ()):  # a product takes one dtype and promotes none
            for operand in node.all_input_nodes:
                if getattr(operand.meta.get("val"), "dtype", None) is torch.float32:
                    node.replace_input_with(operand, Builder(node)(torch.ops.aten.to.dtype, operand, torch.float64))
        node.meta["val"] = derive(node)
        lifted.add(node)
    gm.recompile()
    return casts


def refusals(reports: Sequence[Report]) -> list[str]:
    """The reasons of every refusal, in order."""
    return [record.note for report in reports for record in report.refusals]


# --- hypothesis strategies ---------------------------------------------------------------------------------------------


def tensors(
    shapes: SearchStrategy[tuple[int, ...]],
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *,
    any_strides: bool = True,
) -> SearchStrategy[Tensor]:
    """Normal random tensors of the drawn shape and dtype; with `any_strides` permuted, sliced and channels-last ones."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> Tensor:
        shape, dtype, seed = draw(shapes), draw(st.sampled_from(list(dtypes))), draw(st.integers(0, 2**16))
        generator = torch.Generator().manual_seed(seed)
        layout = draw(st.sampled_from(["contiguous", "permuted", "sliced", "channels_last"])) if any_strides else ""
        if layout == "permuted" and shape:
            order = draw(st.permutations(range(len(shape))))
            x = torch.randn([shape[d] for d in order], generator=generator)
            x = x.permute([order.index(d) for d in range(len(shape))])
        elif layout == "sliced" and shape:
            x = torch.randn([2 * n for n in shape], generator=generator)[tuple(slice(0, n) for n in shape)]
        else:
            x = torch.randn(shape, generator=generator)
            if layout == "channels_last" and len(shape) in (4, 5):
                fmt = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
                x = x.to(memory_format=fmt)
        return x.to(dtype)

    return build()


class RandomVideoModel(nn.Module):
    """A small stack of what video VAEs are made of; the blocks are drawn by `video_models`."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PaddedConv(nn.Module):
    """Pad (causal or not, any mode) and convolve."""

    def __init__(self, conv: nn.Conv3d, pad: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.conv, self.pad, self.mode = conv, pad, mode

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, self.pad, mode=self.mode)) if any(self.pad) else self.conv(x)


class ResidualNorm(nn.Module):
    """x + silu(norm(x)), with group norm or Wan's normalisation over channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels) if groups else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) if self.norm is not None else nn.functional.normalize(x, dim=1, eps=1e-4) * x.shape[1] ** 0.5
        return x + nn.functional.silu(y)


def video_models(max_blocks: int = 4) -> SearchStrategy[tuple[nn.Module, Tensor]]:
    """A random small convolutional video model in eval mode with an input [N, C, T, H, W] that it takes.

    No convolution has both a stride and a dilation above 1: torch's own half-precision convolution on the CPU (oneDNN,
    AVX512; torch 2.11 and 2.13) may crash the process on such a one in channels_last.
    """
    from hypothesis import strategies as st

    small = st.integers(1, 3)

    @st.composite
    def build(draw: Any) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(draw(st.integers(0, 2**16)))
        channels = draw(st.sampled_from([2, 4, 6]))
        x = torch.randn(draw(st.integers(1, 2)), channels, *[draw(st.integers(1, 7)) for _ in range(3)])
        blocks: list[nn.Module] = []
        size = list(x.shape[2:])
        for _ in range(draw(st.integers(1, max_blocks))):
            if draw(st.booleans()):
                blocks.append(ResidualNorm(channels, draw(st.sampled_from([0, 1, 2] if max(size) > 2 else [0]))))
            groups = draw(st.sampled_from([1, 2]))
            out = groups * draw(small)
            kernel, stride, dilation = ([draw(small) for _ in range(3)] for _ in range(3))
            if max(stride) > 1:
                dilation = [1, 1, 1]
            padding = [draw(st.integers(0, 2)) for _ in range(3)]
            mode = draw(st.sampled_from(["constant", "constant", "replicate"]))
            pad = [draw(st.integers(0, 2)) for _ in range(6)] if draw(st.booleans()) else [0] * 6
            if any(n == 1 for n in size) and mode == "replicate":
                mode = "constant"
            after = []
            for i in range(3):
                front, back = pad[4 - 2 * i], pad[5 - 2 * i]
                if size[i] + front + back + 2 * padding[i] < dilation[i] * (kernel[i] - 1) + 1:
                    kernel[i] = 1
                after.append(
                    (size[i] + front + back + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
                )
            conv = nn.Conv3d(
                channels,
                out,
                tuple(kernel),
                tuple(stride),
                tuple(padding),
                tuple(dilation),
                groups,
                draw(st.booleans()),
            )
            blocks.append(PaddedConv(conv, tuple(pad), mode))
            channels, size = out, after
            if channels % 2:
                break
        return RandomVideoModel(blocks).eval(), x

    return build()
