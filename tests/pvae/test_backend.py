"""`torch.compile(model, backend="pvae")`: found without an import, options checked, odd inputs right or refused in words."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.testing import agreement
from pvae.tools.zoo import load

EAGER = {"engine": "eager", "conv3d": "unfold2d"}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(self.conv(x)))


@pytest.fixture
def small() -> Small:
    return Small().eval().requires_grad_(False)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="pvae", options={**EAGER, **options})


def pvae_warnings(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in record if issubclass(w.category, pvae.PvaeWarning)]


def test_nothing_has_to_be_imported() -> None:
    program = (
        "import sys, torch; torch.set_grad_enabled(False); m = torch.nn.Conv3d(2, 2, 3); x = torch.ones(1, 2, 3, 3, 3);"
        "y = torch.compile(m, backend='pvae', options={'engine': 'eager'})(x); assert torch.allclose(y, m(x));"
        "import pvae; assert len(pvae.report(m).graphs) == 1"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"conv3": "auto"}, "no option 'conv3'; did you mean 'conv3d'? It has: conv3d, conv_dtype"),
        ({"conv3d": "fast"}, "valid values of conv3d: auto, native, channels_last, unfold2d"),
        ({"shard": "halo"}, "valid values of shard: none"),
        ({"disable": "fold_pads"}, "did you mean 'fold_pad'? The passes are: canonicalize"),
        ({"passes": "canonicalize,,"}, "cannot read the pipeline"),
        ({"passes": "conv3d_unfold{form=best}"}, "the values of form are auto|native|channels_last|unfold2d"),
        ({"rewrite_limit": "many"}, "not a whole number"),
    ],
)
def test_an_unknown_option_names_the_valid_ones(small: Small, options: dict[str, Any], says: str) -> None:
    with torch.no_grad(), pytest.raises(Exception) as caught:
        compiled(small, **options)(torch.randn(1, 2, 3, 4, 4))
    assert says in str(caught.value)
    with pytest.raises((pvae.OptionError, pvae.PipelineError)) as caught:
        pvae.compile(small, **options)
    assert says in str(caught.value)


def test_an_unknown_variable_names_the_valid_ones(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVAE_CONV3", "auto")
    with pytest.raises(pvae.OptionError, match="did you mean 'PVAE_CONV3D'"):
        pvae.compile(small)


def test_the_environment_wins_and_disable_adds_up(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVAE_CONV3D", "unfold2d")
    monkeypatch.setenv("PVAE_DISABLE", "fold_pad")
    with torch.no_grad():
        pvae.compile(small, conv3d="native", disable="drop_zero_taps", engine="eager")(torch.randn(1, 2, 3, 4, 4))
    report = pvae.report(small)
    assert report.matches("conv3d_unfold") == 1
    assert report.graphs[0].pipeline == "canonicalize,conv_dtype,conv3d_unfold,channels_last"


def test_expected_matches_that_do_not_come_are_an_error(small: Small) -> None:
    model = pvae.compile(small, engine="eager", conv3d="native", expect={"conv3d_unfold": 1})
    with torch.no_grad(), pytest.raises(pvae.PvaeError, match="expected to match 1 times and matched 0"):
        model(torch.randn(1, 2, 3, 4, 4))


def test_rewrite_limit_stops_after_n(small: Small) -> None:
    def rewrites(limit: int) -> int:
        pvae.compile(small, engine="eager", conv3d="unfold2d", rewrite_limit=limit)
        with torch.no_grad():
            small(torch.randn(1, 2, 3, 4, 4))
        return sum(len(p.matches) for p in small.forward.programs[0].report.passes)

    assert [rewrites(n) for n in (0, 1, 100)] == [0, 1, 1]


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_a_second_resolution_is_right(small: Small, dynamic: bool | None) -> None:
    with torch.no_grad():
        run = torch.compile(small, backend="pvae", options=EAGER, dynamic=dynamic)
        for shape in ((1, 2, 3, 4, 5), (1, 2, 5, 6, 7), (2, 2, 4, 5, 9), (1, 2, 3, 4, 5)):
            x = torch.randn(shape)
            torch.testing.assert_close(run(x), small(x))
    if dynamic:
        assert len(pvae.report(small).graphs) <= 2  # one batch, then any


def test_three_instances_compile_once_and_are_right() -> None:
    layers = [Small().eval().requires_grad_(False) for _ in range(3)]
    x = torch.randn(1, 2, 3, 4, 4)
    with torch.no_grad():
        for layer in layers:
            torch.testing.assert_close(compiled(layer)(x), layer(x))
    assert len(pvae.report().graphs) == 1
    assert len(pvae.report(layers[2]).graphs) == 1


def test_a_mutated_input_is_written(small: Small) -> None:
    def counting(x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return small(x) + count.sum()

    x, seen, expected = torch.randn(1, 2, 3, 4, 4), torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        run = torch.compile(counting, backend="pvae", options=EAGER)
        for _ in range(2):
            torch.testing.assert_close(run(x, seen), counting(x, expected))
    assert torch.equal(seen, torch.full((3,), 2.0))


def test_grad_mode_is_left_to_the_engine_and_said_once(small: Small) -> None:
    small.requires_grad_(True)
    x = torch.randn(1, 2, 3, 4, 4)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        run = compiled(small)
        run(x).sum().backward()
        run(torch.randn(1, 2, 4, 5, 5)).sum().backward()
    assert len([w for w in pvae_warnings(record) if "grad mode" in w]) == 1
    assert small.conv.weight.grad is not None
    with pytest.raises(Exception, match="grad mode"):
        torch._dynamo.reset()
        compiled(small, strict="on")(x)


def test_autocast_is_left_alone(small: Small) -> None:
    x = torch.randn(1, 2, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(small)(x), small(x))
        torch.testing.assert_close(pvae.compile(small, engine="eager")(x), pvae.restore(small)(x))
    assert len([w for w in pvae_warnings(record) if "autocast" in w]) == 2


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: x * 2 + 1, torch.randn(2, 3)),  # no convolution at all
        (lambda x: (x.real * 2, torch.view_as_real(x)), torch.randn(3, dtype=torch.complex64)),
        (lambda x: x // 2 + 1, torch.arange(5)),
        (lambda x: nn.functional.conv3d(x, torch.ones(1, 2, 3, 3, 3)), torch.randn(0, 2, 4, 4, 4)),  # empty batch
        (lambda x: (x, x.view(-1), None, 3), torch.randn(2, 3)),
    ],
    ids=["no-conv", "complex", "integer", "empty-batch", "odd-outputs"],
)
def test_odd_inputs_are_right(function: Any, x: Tensor) -> None:
    with torch.no_grad():
        got = torch.compile(function, backend="pvae", options=EAGER)(x)
        expected = function(x)
    torch.testing.assert_close(got, expected)


def test_meta_weights_are_refused_in_words(small: Small) -> None:
    model = Small().to("meta").eval().requires_grad_(False)
    with torch.no_grad(), pytest.raises(pvae.PvaeError, match="meta device and has no values"):
        pvae.compile(model, engine="eager")(torch.randn(1, 2, 3, 4, 4))


def test_a_value_dependent_branch_is_refused_in_words() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with torch.no_grad(), pytest.raises(pvae.PvaeError, match=r"torch.compile\(model, backend='pvae'\)"):
        pvae.compile(Branch(), engine="eager")(torch.ones(2))


def test_negative_bases_keep_their_parentheses() -> None:
    """FX's generated code prints (-1) ** x as -1 ** x: Cosmos' wavelets were off by 1.6 so."""
    case = load("cosmos", part="decode", dtype=torch.float64)
    with torch.no_grad():
        eager = case.run()
        case.model.decoder = torch.compile(case.model.decoder, backend="pvae", options={"engine": "eager"})
        assert agreement(case.run(), eager, eager).ok


def test_where_dynamo_gives_up_one_warning_and_the_report_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    case = load("wan2.1")
    with torch.no_grad(), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        eager = case.run()
        case.model.decoder = torch.compile(case.model.decoder, backend="pvae", options={"engine": "eager"})
        for _ in range(2):
            torch.testing.assert_close(case.run(), eager, rtol=1e-4, atol=1e-4)
    said = [w for w in pvae_warnings(record) if "gave up" in w]
    assert len(said) == 1
    assert "pvae.compile(model)" in said[0]
    assert any("gave up" in note for note in pvae.report(case.model).notes)
