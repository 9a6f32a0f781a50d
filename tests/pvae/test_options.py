"""Options: from code and environment, checked, and every mistake answered with what is valid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pvae
from pvae.options import CHOICES, NAMES, Options, parse_options


def test_defaults_need_no_environment() -> None:
    assert parse_options(None, {}) == Options()
    assert str(Options().pipeline).startswith("canonicalize,prefix_attention,")


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_taken_and_others_name_them(name: str) -> None:
    for choice in CHOICES[name]:
        assert getattr(parse_options({name: choice}, {}), name) == choice
        assert getattr(parse_options({}, {f"PVAE_{name.upper()}": choice}), name) == choice
    for wrong in ("nonsense", 3, ""):
        with pytest.raises(pvae.OptionError, match=f"valid values of {name}: {', '.join(CHOICES[name])}"):
            parse_options({name: wrong}, {})


def test_booleans_and_none_mean_what_they_say() -> None:
    found = parse_options(
        {"verify": False, "strict": True, "channels_last": True, "conv_dtype": None, "passes": None}, {}
    )
    assert (found.verify, found.strict, found.channels_last, found.conv_dtype) == ("off", "on", "on", "none")
    assert found.passes == "default"
    with pytest.raises(pvae.OptionError, match="engine='on' is not possible"):
        parse_options({"engine": True}, {})


@pytest.mark.parametrize(
    ("given", "environment", "says"),
    [
        (
            {"conv_3d": "auto"},
            {},
            r"no option 'conv_3d'; did you mean 'conv3d'\? It has: conv3d, conv_dtype, .*, strict",
        ),
        ({"zzz": 1}, {}, r"no option 'zzz'\. It has: conv3d"),
        (
            {},
            {"PVAE_ENGIN": "eager"},
            r"no environment variable 'PVAE_ENGIN'; did you mean 'PVAE_ENGINE'\?.*PVAE_STRICT",
        ),
        ({"disable": "foldpad"}, {}, "no pass 'foldpad'; did you mean 'fold_pad'"),
        ({"passes": "foldpad"}, {}, "no pass 'foldpad'; did you mean 'fold_pad'"),
        ({"expect": {"foldpad": 1}}, {}, "no pass 'foldpad'; did you mean 'fold_pad'"),
        ({"expect": 3}, {}, "expect takes a dict such as"),
        ({"rewrite_limit": "few"}, {}, "rewrite_limit='few' is not a whole number"),
        ({"rewrite_limit": -1}, {}, "rewrite_limit=-1 is negative"),
        ({"tuning_store": 3}, {}, "tuning_store=3 is not the path of a file, nor off"),
        (
            {"channels_last": "off", "conv3d": "taps"},
            {},
            "channels_last='off' and conv3d='taps' contradict each other.*; conv3d='native' and 'unfold2d' work contiguous",
        ),
        ({"conv3d": "channels_last"}, {"PVAE_CHANNELS_LAST": "off"}, "conv3d='channels_last' contradict each other"),
        ({"shard": "rings"}, {}, "valid values of shard: none, halo, patch, tile, sequence, auto"),
        ({"shard_inputs": 1}, {}, r"shard_inputs takes a dict .* such as \{'hidden_states': 1\}, not 1"),
        ({"shard_inputs": {}}, {}, "shard_inputs takes a dict"),
        ({"shard_inputs": {"x": "rows"}}, {}, "'x' is split along 'rows', which is not a dimension such as 1"),
        ({"shard_inputs": {"x": 1.5}}, {}, "'x' is split along 1.5"),
        ({"shard_inputs": {"x": True}}, {}, "'x' is split along True"),
        ({"shard_inputs": {"x": (None, None)}}, {}, "'x' is split along"),
        ({"shard_inputs": {"x": (0, 1, 2)}}, {}, "'x' is split along"),
        ({"shard_inputs": {"x": (1, 1)}}, {}, "both axes of the mesh split dimension 1 of 'x'"),
        ({}, {"PVAE_SHARD_INPUTS": "hidden_states"}, "'hidden_states' is split along ''"),
        (
            {"shard_inputs": {"x": 1}},
            {},
            "shard_inputs is for shard='sequence' and 'auto'; shard='none' does not read it",
        ),
        (
            {"shard": "sequence", "shard_inputs": {"x": (0, 1)}},
            {},
            "'x' is split along .* for a mesh of 2 axes; say mesh='2x2'",
        ),
        ({"shard": "sequence", "shard_dims": "h"}, {}, "shard_dims: shard='sequence' splits tokens, not pictures"),
        ({"shard": "sequence"}, {"PVAE_PATCH_CONTEXT": "2"}, "patch_context: shard='sequence' splits tokens"),
        ({"mesh": "2x2x2"}, {}, "mesh='2x2x2' is not a number of ranks such as 4, or rows x columns"),
        ({"mesh": "0"}, {}, "mesh='0' is not a number of ranks"),
        ({"patch_context": -1}, {}, "patch_context=-1 is negative"),
        ({"timeout": "soon"}, {}, "timeout='soon' is not a number of seconds"),
        ({"timeout": 0}, {}, "timeout=0.0 is not a time to wait"),
        ({"machine": "h200,speed=1"}, {}, "speed"),
    ],
)
def test_mistakes(given: dict[str, Any], environment: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_options(given, environment)


@pytest.mark.parametrize("entry", ["pvae.compile", "torch.compile"])
@pytest.mark.parametrize(
    ("options", "variables", "says"),
    [
        ({"conv4d": "auto"}, {}, "did you mean 'conv3d'"),
        ({"engine": "tvm"}, {}, "valid values of engine: inductor, eager"),
        ({"disable": "canon"}, {}, "The passes are: canonicalize"),
        ({}, {"PVAE_STRICTER": "on"}, "did you mean 'PVAE_STRICT'"),
        ({}, {"PVAE_CONV3D": "3d"}, "valid values of conv3d"),
    ],
)
def test_both_entrances_say_so(
    monkeypatch: pytest.MonkeyPatch, entry: str, options: dict[str, str], variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match=says), torch.no_grad():
        if entry == "pvae.compile":
            pvae.compile(nn.ReLU(), **options)
        else:
            torch.compile(nn.ReLU(), backend="pvae", options=options)(torch.ones(2))


def test_the_environment_wins_and_disable_is_the_union() -> None:
    given = {"conv3d": "native", "disable": ["fold_pad"], "rewrite_limit": 5}
    environment = {
        "PVAE_CONV3D": "unfold2d",
        "PVAE_DISABLE": "canonicalize,fold_pad",
        "PVAE_REWRITE_LIMIT": "0",
        "OTHER": "1",
    }
    found = parse_options(given, environment)
    assert (found.conv3d, found.disable, found.rewrite_limit) == ("unfold2d", ("fold_pad", "canonicalize"), 0)
    assert str(found.pipeline) == (
        "prefix_attention,join_chunks,drop_zero_taps,pointwise_before_resample,main_rank,shard,inline_main_rank,"
        "fuse_modulation,fuse_residual_gate,wide_attention,conv_dtype,fold_upsample,conv_policy,conv_taps,conv3d_unfold,"
        "channels_last,depth_to_space,fuse_norm_act,split_cache"
    )
    assert parse_options({}, {"PVAE_REWRITE_LIMIT": ""}).rewrite_limit is None


def test_sharding_in_the_environment() -> None:
    variables = {"PVAE_SHARD": "halo", "PVAE_MESH": "2x3", "PVAE_CHECK_INPUTS": "1", "PVAE_TIMEOUT": "2.5"}
    found = parse_options({}, variables)
    assert (found.shard, found.mesh, found.check_inputs, found.timeout) == ("halo", (2, 3), "on", 2.5)
    assert parse_options({"mesh": 4}, {}).mesh == (4,)
    assert parse_options({"mesh": (2, 2)}, {}).mesh == (2, 2)
    assert parse_options({"mesh": "auto"}, {}).mesh is None


def test_inputs_that_are_split() -> None:
    """By code and by the environment the same."""
    for given, text in (
        ({"hidden_states": 1}, "hidden_states=1"),
        ({"hidden_states": -2, "text": (None, 1)}, "hidden_states=-2, text=none:1"),
        ({"hidden_states": (0, 1), "t": (0, None)}, "hidden_states=0:1,t=0:none"),
    ):
        asked = {"shard": "sequence", "mesh": "2x2"}
        found = parse_options({**asked, "shard_inputs": given}, {})
        assert found.shard_inputs == given
        assert parse_options(asked, {"PVAE_SHARD_INPUTS": text}) == found
        assert found.key() != parse_options(asked, {}).key()
    for nothing in (None, "auto", ""):
        assert parse_options({"shard_inputs": nothing}, {}).shard_inputs is None


def test_expect_and_passes_in_the_environment() -> None:
    found = parse_options({}, {"PVAE_EXPECT": "conv3d_unfold=2,fold_pad", "PVAE_PASSES": "conv3d_unfold{form=native}"})
    assert found.expect == {"conv3d_unfold": 2, "fold_pad": 1}
    assert str(found.pipeline) == "conv3d_unfold{form=native}"
    assert str(parse_options({"passes": ""}, {}).pipeline) == ""


def test_key_tells_options_apart() -> None:
    keys = [parse_options({name: choice}, {}).key() for name, choices in CHOICES.items() for choice in choices[1:]]
    keys += [
        parse_options(given, {}).key() for given in ({}, {"disable": "fold_pad"}, {"rewrite_limit": 0}, {"passes": ""})
    ]
    assert len(set(keys)) == len(keys)
    assert parse_options({"conv3d": "auto"}, {}).key() == Options().key()
    assert set(NAMES) == set(Options.__dataclass_fields__)
