"""pvae.compile: one capture for each kind of call, and everything that a call may do to its arguments and its module."""

from __future__ import annotations

import copy
import enum
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pvae
from pvae import module as pvae_module

X = torch.randn(2, 3, 4, 4)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def compiled(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model compiled in place, and an eager copy."""
    eager = copy.deepcopy(model)
    return pvae.compile(model, **{"engine": "eager", **options}), eager


def programs(model: nn.Module) -> int:
    return sum(len(f.programs) for f in pvae_module.compiled_forwards(model))


class Toy(nn.Module):
    """A convolution and whatever `body(self, conv(x), ...)` makes of it."""

    def __init__(self, body: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, self.conv(x), *args, **kwargs)


# --- what makes a kind of call ---------------------------------------------------------------------------------------


class Mode(enum.Enum):
    ADD = "add"
    MUL = "mul"


class Pair(NamedTuple):
    a: Tensor
    b: Tensor | None


def test_shapes_dtypes_and_plain_arguments_are_kinds() -> None:
    def body(self: Toy, y: Tensor, times: float = 1.0, mode: Mode = Mode.ADD, pair: Pair | None = None) -> Tensor:
        y = y + times if mode is Mode.ADD else y * times
        return y if pair is None or pair.b is None else y + pair.a

    model, eager = compiled(Toy(body))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((X,), {}),
        ((X[:1],), {}),
        ((X, 2.0), {}),
        ((X, 2), {}),
        ((X, True), {}),
        ((X,), {"mode": Mode.MUL, "times": 3}),
        ((X,), {"pair": Pair(X, None)}),
        ((X,), {"pair": Pair(X, X)}),
        ((X,), {"pair": Pair(X, X[:1])}),
    ]
    for round_ in range(2):
        for args, kwargs in calls:
            torch.testing.assert_close(model(*args, **kwargs), eager(*args, **kwargs))
        assert programs(model) == len(calls), f"round {round_}"
    model(X.clone()), model(X * 2)
    assert programs(model) == len(calls)


def test_values_and_irrelevant_strides_are_no_kind() -> None:
    model, eager = compiled(Toy(lambda self, y: y + 1))
    wide = torch.randn(2, 3, 4, 9)
    for x in (X, X.flip(0), wide[..., :4], wide[..., 5:], X[:, :, :4]):
        torch.testing.assert_close(model(x), eager(x))
    assert programs(model) == 1
    one = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(model(one), eager(one))
    torch.testing.assert_close(model(one.as_strided(one.shape, (7, 16, 4, 1))), eager(one))
    assert programs(model) == 2
    last = X.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), eager(last))
    assert programs(model) == 3


def test_arguments_that_cannot_be_compared_run_eagerly() -> None:
    class Thing:
        __slots__ = ()

    model, eager = compiled(Toy(lambda self, y, thing: y + 1))
    with pytest.warns(pvae.PvaeWarning, match=r"Toy: runs eagerly: an argument is a .*(Thing|set), which") as caught:
        for _ in range(2):
            torch.testing.assert_close(model(X, Thing()), eager(X, None))
        torch.testing.assert_close(model(X, {1, 2}), eager(X, None))
    assert len(caught) == 2, "one for each type"
    torch.testing.assert_close(model(X, None), eager(X, None))
    assert programs(model) == 1


def test_too_many_kinds_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pvae_module, "MAX_PROGRAMS", 3)
    model, eager = compiled(Toy(lambda self, y, n: y * n))
    with pytest.warns(pvae.PvaeWarning, match="more than 3 kinds of call were captured"):
        for n in range(6):
            torch.testing.assert_close(model(X, n), eager(X, n))
    assert programs(model) == 3


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_of_any_structure() -> None:
    def body(self: Toy, y: Tensor, x: Tensor) -> Any:
        return {"y": y, "none": None, "n": y.shape[0], "same": [y, (x, "text", 1.5)], "pair": Pair(y + 1, None)}, x

    model, eager = compiled(Toy(body))
    for _ in range(2):
        got, x = model(X, X)
        want, _ = eager(X, X)
        assert x is X and got["same"][1][0] is X and got["same"][0] is got["y"]
        assert got["same"][1][1:] == ("text", 1.5) and got["none"] is None and got["n"] == 2
        assert type(got["pair"]) is Pair and got["pair"].b is None
        torch.testing.assert_close((got["y"], got["pair"].a), (want["y"], want["pair"].a))


def test_none_and_number_results() -> None:
    assert compiled(Toy(lambda self, y: None))[0](X) is None
    assert compiled(Toy(lambda self, y: y.shape[2]))[0](X) == 4


def test_results_that_hide_tensors_run_eagerly() -> None:
    @dataclass
    class Hidden:
        y: Tensor

    def keeps(self: Toy, y: Tensor, box: list[Any]) -> Tensor:
        box[0] = Hidden(y)
        return y

    for body, args in ((lambda self, y: Hidden(y), ()), (keeps, ([None],))):
        model, eager = compiled(Toy(body))
        with pytest.warns(pvae.PvaeWarning, match=r"forward returns or keeps a .*Hidden, which a capture cannot take"):
            got = model(X, *args)
        hidden = args[0][0] if args else got
        assert type(hidden.y) is Tensor
        torch.testing.assert_close(hidden.y, eager.conv(X))
        pvae.reset()


# --- arguments that forward writes -----------------------------------------------------------------------------------


def test_list_and_dict_arguments_are_written() -> None:
    def body(self: Toy, y: Tensor, cache: list[Any], table: dict[str, Any]) -> Tensor:
        old = cache[0]
        cache[0] = y[:, :1].clone()
        cache.append(None if old is None else Pair(old + 1, None))
        cache[1][0] = [y * 2]
        table["count"] = table.get("count", 0) + 1
        table["last"] = table.pop("first", None)
        return y if old is None else y + old

    model, eager = compiled(Toy(body))
    boxes = [([None, ["x"]], {"first": X}) for _ in range(2)]
    inner = [cache[1] for cache, _ in boxes]
    for _ in range(4):
        results = [m(X, cache, table) for m, (cache, table) in zip((model, eager), boxes, strict=True)]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(boxes[0][0], boxes[1][0])
        assert boxes[0][1].keys() == boxes[1][1].keys() and boxes[0][1]["count"] == boxes[1][1]["count"]
    assert boxes[0][0][1] is inner[0], "the caller's own inner list"
    leaves = torch.utils._pytree.tree_leaves(boxes[0])
    assert all(type(t) in (Tensor, int, str, type(None)) for t in leaves)
    assert type(boxes[0][0][-1]) is Pair


def test_mutated_inputs() -> None:
    def body(self: Toy, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x[:, 0] = 7
        x.mul_(2)
        return y, x

    model, eager = compiled(Toy(body))
    base = torch.randn(2, 6, 4, 4)
    for make in (lambda: X.clone(), lambda: base.clone()[:, ::2], lambda: base.clone()[:, :3].transpose(2, 3)):
        ours, theirs = make(), make()
        (y, x), (ey, _) = model(X, ours), eager(X, theirs)
        assert x is ours and torch.equal(ours, theirs)
        torch.testing.assert_close(y, ey)


def test_mutated_input_that_shares_memory_runs_eagerly() -> None:
    model, eager = compiled(Toy(lambda self, y, a, b: a.add_(1) + b))
    ours, theirs = torch.ones(2), torch.ones(2)
    with pytest.warns(pvae.PvaeWarning, match="an input that is written shares memory with another input"):
        got = model(X, ours, ours)
    assert torch.equal(got, eager(X, theirs, theirs)) and torch.equal(ours, theirs)


# --- attributes of the module ----------------------------------------------------------------------------------------


def grows_list(self: Toy, y: Tensor) -> Tensor:
    for old in self.kept[-2:]:
        y = y + old
    self.kept.append(y)
    return y


def fills_dict(self: Toy, y: Tensor) -> Tensor:
    y = y + self.kept["y"][0] if "y" in self.kept else y
    self.kept["y"] = [y]
    return y


def makes_attribute(self: Toy, y: Tensor) -> Tensor:
    y = y + self.kept if hasattr(self, "kept") else y
    self.kept = y
    return y


def drops_attribute(self: Toy, y: Tensor) -> Tensor:
    y = makes_attribute(self, y)
    if float(y.shape[0]) == 2 and getattr(self, "again", False):
        del self.kept
    self.again = True
    return y


def replaces_attribute(self: Toy, y: Tensor) -> Tensor:
    y = y if self.kept is None else y + self.kept
    self.kept = y * 0.5
    return y


def replaces_buffer(self: Toy, y: Tensor) -> Tensor:
    self.running = self.running * 0.5 + y.mean((0, 2, 3))
    return y + self.running[:, None, None]


def updates_buffer(self: Toy, y: Tensor) -> Tensor:
    self.running.mul_(0.5).add_(y.mean((0, 2, 3)))
    return y + self.running[:, None, None]


def counts(self: Toy, y: Tensor) -> Tensor:
    self.kept += 1
    return y * self.kept


@pytest.mark.parametrize(
    ("body", "attributes"),
    [
        (grows_list, {"kept": []}),
        (fills_dict, {"kept": {}}),
        (makes_attribute, {}),
        (drops_attribute, {}),
        (replaces_attribute, {"kept": None}),
        (replaces_attribute, {"kept": torch.ones(3, 1, 1)}),
        (replaces_buffer, {}),
        (updates_buffer, {}),
        (counts, {"kept": 0}),
    ],
)
def test_attributes_that_forward_writes(body: Callable[..., Any], attributes: dict[str, Any]) -> None:
    toy = Toy(body, **attributes)
    toy.register_buffer("running", torch.zeros(3))
    own = toy.__dict__.get("kept")
    model, eager = compiled(toy)
    for _ in range(5):
        torch.testing.assert_close(model(X), eager(X))
        assert ("kept" in model.__dict__) == ("kept" in eager.__dict__)
        torch.testing.assert_close(model.__dict__.get("kept"), eager.__dict__.get("kept"))
        torch.testing.assert_close(model.running, eager.running)
    if isinstance(own, (list, dict)):
        assert model.kept is own
    eager.__dict__.update(kept=copy.deepcopy(attributes.get("kept")))
    if "kept" in attributes:  # a reset between two clips, as Magvit's decoder does
        model.kept = copy.deepcopy(attributes["kept"])
        model.running.zero_(), eager.running.zero_()
        torch.testing.assert_close(model(X), eager(X))


def test_attributes_changed_between_calls_choose_another_capture() -> None:
    model, eager = compiled(Toy(lambda self, y: y * self.scale if self.on else y, scale=2.0, on=True))
    for scale, on in ((2.0, True), (3.0, True), (3.0, False), (2, True), (None, False), (2.0, True)):
        model.scale = eager.scale = scale
        model.on = eager.on = on
        torch.testing.assert_close(model(X), eager(X))
    assert programs(model) == 5
    model.train(), eager.train()
    model.scale = eager.scale = 1.0
    torch.testing.assert_close(model(X), eager(X))


def test_train_and_eval_differ() -> None:
    model, _ = compiled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.9)).eval())
    assert (model(X) == 0).float().mean() < 0.1
    assert (model.train()(X) == 0).float().mean() > 0.7
    assert (model.eval()(X) == 0).float().mean() < 0.1 and programs(model) == 2


def test_batch_norm_in_training() -> None:
    model, eager = compiled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    for _ in range(3):
        torch.testing.assert_close(model(X), eager(X))
    torch.testing.assert_close(model.state_dict(), eager.state_dict())


# --- the module itself changes ---------------------------------------------------------------------------------------


def test_submodules_may_come_and_go() -> None:
    model, eager = compiled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 1))))
    model(X)
    for m in (model, eager):
        torch.manual_seed(1)
        m[2][0] = nn.Conv2d(3, 5, 3)
        m.append(nn.Sigmoid())
    torch.testing.assert_close(model(X), eager(X))
    for m in (model, eager):
        del m[1]
    torch.testing.assert_close(model(X), eager(X))


def test_a_parametrization_may_come_later() -> None:
    model, eager = compiled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    model(X)
    for m in (model, eager):
        nn.utils.parametrizations.weight_norm(m[0])
        m[0].parametrizations.weight.original0.data.mul_(2)
    torch.testing.assert_close(model(X), eager(X))


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_a_parameter_of_another_size(engine: str) -> None:
    model, _ = compiled(nn.Sequential(nn.Linear(4, 8)), engine=engine)
    assert model(X).shape[-1] == 8
    model[0].weight, model[0].bias = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(16))
    torch.testing.assert_close(model(X), F.linear(X, model[0].weight, model[0].bias))


def test_to_another_dtype() -> None:
    model, eager = compiled(Toy(lambda self, y: y.relu()))
    model(X)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        got = model.to(dtype)(X.to(dtype))
        torch.testing.assert_close(got, eager.to(dtype)(X.to(dtype)))


def test_tied_weights_stay_tied_until_untied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model, eager = compiled(model)
    torch.testing.assert_close(model(X), eager(X))
    for m in (model, eager):
        m[0].weight.mul_(2)
    torch.testing.assert_close(model(X), eager(X))
    for m in (model, eager):
        m[1].weight = nn.Parameter(torch.eye(4))
    torch.testing.assert_close(model(X), eager(X))


def test_hooks() -> None:
    """On the module itself they run; inside, the module stays eager and says so, whenever they came."""
    for late in (False, True):
        pvae.reset()
        model, eager = compiled(Toy(lambda self, y: y + 1))
        model.register_forward_hook(lambda module, args, y: y * 2)
        torch.testing.assert_close(model(X), eager(X) * 2) if late else None
        model.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        with pytest.warns(pvae.PvaeWarning, match="Toy: runs eagerly: submodule 'conv' has forward hooks") as caught:
            for _ in range(3):
                torch.testing.assert_close(model(X), eager(X + 1) * 2)
        assert len(caught) == 1


def test_refresh_sees_what_nobody_can() -> None:
    class Holder:
        scale = 2.0

    holder = Holder()
    model, _ = compiled(Toy(lambda self, y: y * self.holder.scale, holder=holder))
    before = model(X)
    holder.scale = 4.0
    pvae.refresh(model)
    torch.testing.assert_close(model(X), before * 2)


# --- life of a compiled model ----------------------------------------------------------------------------------------


def test_restore() -> None:
    model, eager = compiled(Toy(lambda self, y: y + 1))
    model(X)
    assert "forward" in model.__dict__
    assert pvae.restore(model) is model and "forward" not in model.__dict__
    torch.testing.assert_close(model(X), eager(X))


def test_restore_gives_back_a_forward_of_ones_own() -> None:
    model = Toy(lambda self, y: y)
    own = lambda x: x + 5  # noqa: E731
    model.forward = own  # type: ignore[method-assign]
    assert torch.equal(pvae.compile(model, engine="eager")(X), X + 5)
    assert pvae.restore(model).forward is own


def test_compiling_again_replaces_the_options() -> None:
    model, _ = compiled(nn.Sequential(nn.Conv3d(3, 3, 3)))
    x = torch.randn(1, 3, 4, 4, 4)
    model(x)
    pvae.compile(model, engine="eager", conv3d="unfold2d", expect={"conv3d_unfold": 1})
    model(x)
    assert not isinstance(model.forward.original, type(model.forward))
    assert next(g.counters for g in pvae.report(model).graphs[-1].passes if g.name == "conv3d_unfold")["unfold2d"] == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = pvae.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), engine="eager")
    before = model(X)
    twin = copied(model)
    assert twin.forward.module is twin and twin.forward.original.__self__ is twin
    twin[0].weight.zero_()
    torch.testing.assert_close(twin(X), twin[0].bias[:, None, None].relu().expand_as(before))
    assert torch.equal(model(X), before)
    pvae.restore(twin)
    assert "forward" not in twin.__dict__ and "forward" in model.__dict__


def test_regions() -> None:
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(1, 1)

    class Block(nn.Linear):
        pass

    class Transformer(nn.Module):
        _repeated_blocks = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.out = nn.ModuleList(Block(4, 4) for _ in range(3)), nn.Linear(4, 4)

    for model, names in (
        (Vae(), ["encoder", "decoder"]),
        (Transformer(), ["blocks.0", "blocks.1", "blocks.2"]),
        (nn.Linear(1, 1), [""]),
    ):
        pvae.compile(model)
        assert [name for name, m in model.named_modules() if "forward" in m.__dict__] == names
        assert list(pvae_module.regions(model)) == names


def test_inside_an_outer_compile_the_models_own_forward_is_taken() -> None:
    model, eager = compiled(Toy(lambda self, y: y.relu()))
    outer = torch.compile(nn.Sequential(model, nn.Sigmoid()), backend="eager", fullgraph=True)
    torch.testing.assert_close(outer(X), eager(X).sigmoid())
    assert programs(model) == 0


def test_strict_raises_where_it_would_run_eagerly() -> None:
    model, _ = compiled(Toy(lambda self, y, thing: y), strict="on")
    with pytest.raises(pvae.PvaeError, match="Toy: runs eagerly: an argument is a builtins.object"):
        model(X, object())
    with torch.enable_grad(), pytest.raises(pvae.PvaeError, match="grad mode is on"):
        model(X, None)


def test_grad_mode_is_left_alone_with_one_warning() -> None:
    model, eager = compiled(Toy(lambda self, y: y.sin()))
    with torch.enable_grad(), pytest.warns(pvae.PvaeWarning, match=r"use torch\.no_grad\(\)") as caught:
        for m in (model, eager, model):
            m(X).sum().backward()
    assert len(caught) == 1 and programs(model) == 0
    torch.testing.assert_close(model.conv.weight.grad, eager.conv.weight.grad * 2)
    model.requires_grad_(False)
    with torch.enable_grad():
        torch.testing.assert_close(model(X), eager(X))
    assert programs(model) == 1


def test_values_that_decide_are_left_to_dynamo() -> None:
    model, eager = compiled(Toy(lambda self, y: y if y.sum() > 0 else -y))
    with pytest.warns(pvae.PvaeWarning, match=r"Toy: forward decides by a tensor's value.*in several graphs") as caught:
        for x in (X, -X, X):
            torch.testing.assert_close(model(x), eager(x))
    assert len([w for w in caught if "decides" in str(w.message)]) == 1 and programs(model) == 0
    assert pvae.report(model).graphs
    pvae.restore(model)
    assert "forward" not in model.__dict__


def test_values_that_decide_are_an_error_under_strict() -> None:
    model, _ = compiled(Toy(lambda self, y: y if y.sum() > 0 else -y), strict="on")
    with pytest.raises(pvae.PvaeError, match=r"Toy: forward decides by a tensor's value"):
        model(X)


def test_numpy_in_forward_is_left_to_dynamo() -> None:
    model, eager = compiled(Toy(lambda self, y: y * float(y.detach().cpu().numpy().sum() > 0)))
    with pytest.warns(pvae.PvaeWarning, match="forward decides by a tensor's value"):
        torch.testing.assert_close(model(X), eager(X))


def test_an_error_of_the_model_leaves_it_usable() -> None:
    def body(self: Toy, y: Tensor) -> Tensor:
        self.kept = y
        if y.shape[0] == 1:
            raise RuntimeError("one is too few")
        return y

    model, eager = compiled(Toy(body, kept=None))
    with pytest.raises(RuntimeError, match="one is too few"):
        model(X[:1])
    assert model.kept is None or type(model.kept) is Tensor
    torch.testing.assert_close(model(X), eager(X))
    with pytest.raises(RuntimeError, match="expected input"):
        model(X[:, :2])


@pytest.mark.parametrize("weights", ["live", "frozen"])
def test_inference_mode(weights: str) -> None:
    """Models made in it, models called in it, and the other way round."""
    x = torch.randn(1, 3, 4, 4, 4)
    with torch.inference_mode():
        made = nn.Sequential(nn.Conv3d(3, 3, 3))
        expected = made(x)
        pvae.compile(made, engine="eager", weights=weights, conv3d="unfold2d")
        torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made(x), expected.clone())
    model, eager = compiled(nn.Sequential(nn.Conv3d(3, 3, 3)), weights=weights, conv3d="unfold2d")
    with torch.inference_mode():
        assert model(x).is_inference()
    assert not model(x).is_inference()
    torch.testing.assert_close(model(x), eager(x))
    assert programs(model) == 1


def test_constants_made_in_forward() -> None:
    model, eager = compiled(Toy(lambda self, y: y + torch.tensor([1.0, 2.0, 3.0])[:, None, None]))
    for _ in range(2):
        torch.testing.assert_close(model(X), eager(X))
    assert pvae.report(model).graphs[0].notes == ["1 tensors made in forward are constants of the graph"]


def test_random_numbers_are_drawn_in_every_call() -> None:
    model, _ = compiled(Toy(lambda self, y: y + torch.randn_like(y)))
    assert not torch.equal(model(X), model(X))


def test_no_warning_where_all_is_well() -> None:
    model, _ = compiled(Toy(lambda self, y: y.relu()), strict="on")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pvae.PvaeWarning)
        model(X)
