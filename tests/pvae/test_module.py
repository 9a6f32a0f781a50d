"""`pvae.compile`: one capture for each kind of call, with everything that a call may read and write besides tensors."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import module as pvae_module
from pvae.tools.zoo import load


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def graphs(model: nn.Module) -> int:
    return len(pvae.report(model).graphs)


class Cached(nn.Module):
    """Writes into the list and the dict that it is given, as causal decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, caches: list[Any], more: dict[str, Any], scale: float = 1.0) -> Any:
        y = self.linear(x) * scale
        if caches[0] is not None:
            y = y + caches[0]
        caches[0] = y.clone()
        caches[1] = "seen"
        more["last"] = (y * 2, len(caches))
        return {"out": y, "same": x, "none": None, "number": 3}


def test_lists_dicts_and_odd_results_are_replayed() -> None:
    model, plain = pvae.compile(Cached(), engine="eager"), Cached()
    plain.load_state_dict(model.state_dict())
    ours, theirs = ([None, None], {}), ([None, None], {})
    for _ in range(3):
        x = torch.randn(2, 3)
        got, expected = model(x, *ours), plain(x, *theirs)
        torch.testing.assert_close(got["out"], expected["out"])
        assert got["same"] is x
        assert (got["none"], got["number"]) == (None, 3)
        torch.testing.assert_close(ours[0][0], theirs[0][0])
        assert ours[0][1] == "seen"
        torch.testing.assert_close(ours[1]["last"][0], theirs[1]["last"][0])
        assert ours[1]["last"][1] == 2
    assert graphs(model) == 2  # without and with a cache
    model(torch.randn(2, 3), [None, None], {}, scale=2.0)
    assert graphs(model) == 3  # a plain argument is part of the kind


def test_wan_decodes_any_length_as_three_graphs() -> None:
    model = pvae.compile(load("wan2.1").model, engine="eager")
    plain = load("wan2.1").model
    for size, expected in (((13, 32, 48), 3), ((5, 32, 48), 3), ((21, 32, 48), 3), ((1, 32, 48), 3), ((13, 48, 32), 6)):
        case = load("wan2.1", size=size)
        torch.testing.assert_close(case.run(model), case.run(plain), rtol=1e-4, atol=1e-4)
        assert graphs(model) == expected, size
    case = load("wan2.1", size=(13, 32, 48))
    case.run(model)
    assert graphs(model) == 6  # the first resolution again compiles nothing


class Counting(nn.Module):
    """Keeps a tensor and a flag on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Tensor | None = None
        self.mode = "add"

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.memory is None else x + self.memory
        self.memory = y * 0.5
        return y if self.mode == "add" else -y


def test_attributes_that_forward_writes_and_reads() -> None:
    model, plain = pvae.compile(Counting(), engine="eager"), Counting()
    for mode in ("add", "add", "negate", "add"):
        model.mode = plain.mode = mode
        x = torch.randn(3)
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.memory, plain.memory)
    model.memory = plain.memory = None  # as `clear_cache` does
    x = torch.randn(3)
    assert torch.equal(model(x), plain(x))
    assert len(model.forward.programs) == 3


def test_magvit_keeps_its_caches_on_itself() -> None:
    case = load("magvit")
    eager = case.run()
    pvae.compile(case.model, engine="eager")
    for _ in range(2):
        torch.testing.assert_close(case.run(), eager, rtol=1e-4, atol=1e-4)
    assert graphs(case.model) == 2


def test_a_replaced_submodule_and_another_dtype_are_captured_anew() -> None:
    model = pvae.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), engine="eager")
    x = torch.randn(2, 3)
    model(x)
    model[0] = nn.Linear(3, 5)
    torch.testing.assert_close(model(x), nn.functional.relu(model[0](x)))
    model.double()
    assert model(x.double()).dtype == torch.float64
    model.train()
    model(x.double())


def test_hooks_inside_run_at_every_call() -> None:
    model, calls = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    pvae.compile(model, engine="eager")
    with pytest.warns(pvae.PvaeWarning, match="submodule '0' has forward hooks"):
        model(torch.randn(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        model(torch.randn(2, 3))
    assert len(calls) == 2


def test_an_argument_that_cannot_be_compared_runs_eagerly_and_says_so() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, thing: object) -> Tensor:
            return x + 1

    with pytest.warns(pvae.PvaeWarning, match="an argument is a builtins.object"):
        assert torch.equal(pvae.compile(Takes(), engine="eager")(torch.ones(2), object()), torch.full((2,), 2.0))
    with pytest.raises(pvae.PvaeError, match="cannot compare"):
        pvae.compile(Takes(), engine="eager", strict="on")(torch.ones(2), object())


@pytest.mark.parametrize("sliced", [False, True])
def test_a_written_argument_is_written(sliced: bool) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return x + 1

    model, whole = pvae.compile(Writes(), engine="eager"), torch.ones(4, 4)
    x = whole[:, 1:3] if sliced else whole
    for factor in (2, 4):
        assert torch.equal(model(x), torch.full_like(x, factor + 1))
        assert torch.equal(x, torch.full_like(x, factor))
    assert whole[0, 0] == (1 if sliced else 4)


def test_no_more_than_max_programs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pvae_module, "MAX_PROGRAMS", 2)
    model = pvae.compile(nn.Linear(3, 3), engine="eager")
    model(torch.randn(1, 3))
    model(torch.randn(2, 3))
    with pytest.warns(pvae.PvaeWarning, match="more than 2 kinds of call"):
        model(torch.randn(3, 3))
    assert graphs(model) == 2


def test_restore_copy_and_pickle() -> None:
    vae = pvae.compile(load("kl").model, engine="eager")
    z = load("kl").inputs[0]
    expected = vae.decode(z).sample
    twin = copy.deepcopy(vae)
    assert twin.decoder.forward.module is twin.decoder
    torch.testing.assert_close(twin.decode(z).sample, expected)
    buffer = io.BytesIO()
    torch.save(nn.ModuleList([pvae.compile(nn.Linear(3, 3), engine="eager")]), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)[0](torch.ones(3)).shape == (3,)
    pvae.restore(vae)
    assert "forward" not in vae.decoder.__dict__
    torch.testing.assert_close(vae.decode(z).sample, expected, rtol=1e-4, atol=1e-4)


def test_an_outer_torch_compile_takes_the_models_own_forward() -> None:
    model = pvae.compile(nn.Sequential(nn.Conv3d(2, 2, 3), nn.ReLU()), engine="eager")
    x = torch.randn(1, 2, 3, 4, 4)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
