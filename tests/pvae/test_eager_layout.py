"""Weights and caches that `pvae.compile` lays out anew: the model sees no difference, in what it may do and what it returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pvae
from pvae.module import compiled_forwards
from pvae.tools.zoo import load

X = torch.randn(2, 4, 8, 6, 6)
LAST: dict[str, Any] = {"channels_last": "on", "engine": "eager"}


class Net(nn.Module):
    """Two convolutions of videos, and `between(y, ...)` on what goes from one to the other."""

    def __init__(self, between: Callable[..., Tensor] = lambda y: y) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 4, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        result: Tensor = self.b(self.between(self.a(x), *args))
        return result


def compiled(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model compiled in place, and an eager copy."""
    eager = copy.deepcopy(model)
    return pvae.compile(model, **LAST, **options), eager


def is_laid(model: nn.Module) -> bool:
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and max(m.kernel_size) > 1]
    laid = [conv.weight.stride(1) == 1 for conv in convs]
    assert all(laid) or not any(laid)
    return all(laid)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_results_have_eagers_strides(engine: str) -> None:
    model, eager = compiled(Net())
    model = pvae.compile(model, channels_last="on", engine=engine)
    identity = [id(p) for p in model.parameters()]
    with torch.no_grad():
        for _ in range(2):
            assert_same(model(X), eager(X))
    assert is_laid(model) and identity == [id(p) for p in model.parameters()]
    (graph,) = pvae.report(model).graphs
    assert graph.passes[-1].counters["outputs_relaid"] == 1
    assert graph.matches("channels_last") == 0, "the weights have it already"


def test_a_view_that_only_contiguous_activations_allow() -> None:
    def between(y: Tensor) -> Tensor:
        n, c, t, h, w = y.shape
        return F.silu(y.view(n * c, t, h, w)).view(n, c, t, h, w)

    model, eager = compiled(Net(between))
    with torch.no_grad():
        assert_same(model(X), eager(X))
    assert is_laid(model)


def test_a_graph_that_reads_strides() -> None:
    def between(y: Tensor) -> Tensor:
        return y + y.as_strided((2, 8, 8, 6, 6), (2304, 288, 1, 48, 8))

    model, eager = compiled(Net(between))
    with torch.no_grad():
        assert_same(model(X), eager(X))
        assert_same(model(X * 2), eager(X * 2))
    assert is_laid(model)


def test_a_model_that_is_channels_last_itself() -> None:
    net = Net()
    net = net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    model, eager = compiled(net)
    with torch.no_grad():
        assert_same(model(X), eager(X))
        assert model(X).is_contiguous(memory_format=torch.channels_last_3d)
    pvae.restore(model)
    assert is_laid(model)


def test_caches_that_come_back_laid_out() -> None:
    """The second chunk is given the first one's cache, channels_last; its results are as if there had been none."""

    def between(y: Tensor, cache: list[Tensor]) -> Tensor:
        joined = torch.cat([*cache, y], 2)
        cache[:] = [joined[:, :, -2:].clone()]
        n, c, t, h, w = joined.shape
        return joined.view(n * c, t, h, w).view(n, c, t, h, w)[:, :, -y.shape[2] :] * 2

    model, eager = compiled(Net(between))
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    with torch.no_grad():
        for chunk in (X, X + 1, X + 2):
            assert_same(model(chunk, ours), eager(chunk, theirs))
            assert ours[0].stride(1) == 1 and theirs[0].is_contiguous()
    assert sum(len(f.programs) for f in compiled_forwards(model)) == 2


def test_caches_that_eager_has_channels_last_itself() -> None:
    class Joins(Net):
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            (cache,) = args
            y = super().forward(x).contiguous(memory_format=torch.channels_last_3d)
            joined = torch.cat([*cache, y], 2)
            cache[:] = [y[:, :, -2:].clone()]
            return joined

    model, eager = compiled(Joins())
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    with torch.no_grad():
        for number in range(3):
            result = model(X + number, ours)
            assert_same(result, eager(X + number, theirs))
            assert result.stride(1) == 1, "a case in which it matters"


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "mochi"])
def test_causal_decoders(name: str) -> None:
    """Wan holds its caches in a list, CogVideoX and Mochi return them in a dict."""
    pytest.importorskip("diffusers")
    case = load(name)
    eager = copy.deepcopy(case.model)
    pvae.compile(case.model, conv3d="taps", norm_act="on", engine="eager")
    latents = torch.randn(1, case.inputs[0].shape[1], 5, *case.inputs[0].shape[3:])
    with torch.no_grad():
        assert_same(case.run(case.model, (latents,)), case.run(eager, (latents,)))
    assert is_laid(case.model.decoder)


def test_restore_gives_the_weights_back() -> None:
    model, eager = compiled(Net())
    with torch.no_grad():
        model(X)
        assert is_laid(model)
        pvae.compile(model, **LAST)
        assert not is_laid(model), "what was compiled before is undone first"
        assert_same(model(X), eager(X))
        assert is_laid(model)
        pvae.restore(model)
        assert not is_laid(model)
        assert_same(model(X), eager(X))
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride(), name


def test_a_call_that_runs_eagerly_has_its_own_strides() -> None:
    """A training step between two calls: the model's `view`s hold there too, and what was captured stays."""

    def between(y: Tensor) -> Tensor:
        return F.silu(y.view(16, 8, 6, 6)).view(2, 8, 8, 6, 6)

    model, eager = compiled(Net(between))
    with torch.no_grad():
        assert_same(model(X), eager(X))
    (first,) = compiled_forwards(model)[0].programs
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.warns(pvae.PvaeWarning, match="grad mode is on"):
        loss = model(X).square().mean()
    loss.backward()
    eager(X).square().mean().backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        for m in (model, eager):
            for p in m.parameters():
                p -= 0.1 * p.grad
        assert_same(model(X), eager(X))
    assert is_laid(model) and compiled_forwards(model)[0].programs == [first]
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_what_an_eager_call_writes_to_a_weight_stays() -> None:
    def between(y: Tensor, scale: float | None = None) -> Tensor:
        if scale is not None:
            model.a.weight.data.mul_(scale)
        return y

    model, eager = compiled(Net(between))
    with torch.no_grad():
        model(X)
    with pytest.warns(pvae.PvaeWarning, match="grad mode is on"):
        model(X, 2.0)
    torch.testing.assert_close(model.a.weight, 2 * eager.a.weight)
    assert is_laid(model)


def test_a_model_that_stays_eager_keeps_its_strides() -> None:
    model, _ = compiled(Net())
    model.a.register_forward_hook(lambda *_: None)
    with torch.no_grad(), pytest.warns(pvae.PvaeWarning, match="forward hooks"):
        model(X)
    assert not is_laid(model)


def test_a_kind_of_call_that_cannot_be_captured_gives_the_weights_back() -> None:
    class Opaque:
        __slots__ = ("y",)

    def between(y: Tensor, opaque: bool = False) -> Any:
        return y

    class Keeps(Net):
        def forward(self, x: Tensor, *args: Any) -> Any:
            y = super().forward(x)
            thing = Opaque()
            thing.y = y
            return thing if args else y

    model, eager = compiled(Keeps(between))
    with torch.no_grad():
        assert_same(model(X), eager(X))
        assert is_laid(model)
        with pytest.warns(pvae.PvaeWarning, match="cannot take apart"):
            model(X, True)
        assert not is_laid(model)


def test_a_forward_that_decides_by_values_gets_its_strides() -> None:
    def between(y: Tensor) -> Tensor:
        y = y.view(16, 8, 6, 6).view(2, 8, 8, 6, 6)
        return y * 2 if y.sum() > 1e9 else y

    model, eager = compiled(Net(between))
    with torch.no_grad(), pytest.warns(pvae.PvaeWarning, match="decides by a tensor's value"):
        assert_same(model(X), eager(X))
    assert not is_laid(model)


def test_weights_that_are_replaced_are_laid_out_anew() -> None:
    model, eager = compiled(Net())
    with torch.no_grad():
        model(X)
        new = {name: 2 * p.detach().contiguous() for name, p in model.named_parameters()}
        model.load_state_dict(new, assign=True)
        eager.load_state_dict(new)
        assert not is_laid(model)
        assert_same(model(X), eager(X))
        assert is_laid(model)


def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model, eager = compiled(Net())
        assert_same(model(X), eager(X))
    with torch.no_grad():
        assert_same(model(X), eager(X))
        with torch.autocast("cpu"), pytest.warns(pvae.PvaeWarning, match="autocast is on"):
            assert model(X).dtype is torch.bfloat16
        assert is_laid(model)
        pvae.restore(model)
        assert not is_laid(model)
        assert_same(model(X), eager(X))


def test_two_models_that_share_a_weight() -> None:
    a, b = Net(), Net()
    b.a.weight = a.a.weight
    (one, eager_one), (two, eager_two) = compiled(a), compiled(b)
    with torch.no_grad():
        for _ in range(2):
            assert_same(one(X), eager_one(X))
            assert_same(two(X), eager_two(X))
        pvae.restore(one)
        assert_same(two(X), eager_two(X))
