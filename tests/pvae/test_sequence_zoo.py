"""Every transformer of the zoo, its tokens split over any mesh, equals itself unsharded in float64 to 1e-12.

The forward is one graph where it can be captured so, else the repeated blocks are, and activations stay pieces between them.

Sizes: the preset's own; 5 x 7 tokens a frame, which no world of 2, 3 or 4 divides; 2 tokens, fewer than ranks. The default
profile takes one size, mesh and machine for each model, in turn; `--hypothesis-profile=deep` takes all. Run as a script it
prints the rows of docs/sequence-coverage.md, or those of the models that are named:
`python -m tests.pvae.test_sequence_zoo [NAME...]`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import cycle
from pathlib import Path

import pytest
import torch
from hypothesis import settings

pytest.importorskip("diffusers")

from pvae.backend import PvaeError
from pvae.options import Options, parse_options
from pvae.passes.sequence import NO_TOKENS
from pvae.testing import FLOAT64_BOUND, capture, lift_float32
from pvae.tools.zoo import load, names
from pvae.tools.zoo.load import TRANSFORMERS
from tests.pvae.replay import Call, Outcome, record, replay

TABLE = Path(__file__).parents[2] / "docs" / "sequence-coverage.md"
NO_PATCHES = frozenset(  # a token for every latent; the others make one of 2 x 2
    {"ltx-dit", "ltx-condition-dit", "ltx2-dit", "sana-dit", "sana-wm-dit", "ernie-image-dit", "dreamlite-dit"}
)
SIZES: Mapping[tuple[str, str], tuple[int, ...]] = {  # where the model does not take the usual ones
    ("cogvideox1.5-dit", "odd"): (10, 10, 14),  # patches of two frames
    ("cogvideox1.5-dit", "few"): (2, 2, 4),
    ("cosmos2-dit", "odd"): (3, 2, 6),  # no more than its table has
    ("cosmos2-video2world-dit", "odd"): (3, 2, 6),
    ("latte-dit", "odd"): (3, 10, 14),  # its number of frames is fixed
    ("dit", "odd"): (10, 10),  # square pictures
    ("wan-animate-dit", "few"): (2, 2, 4),
}
MESHES = {"own": ((2,), (3,), (4,), (2, 2)), "odd": ((2,), (3,), (4,), (2, 3)), "few": ((3,), (5,))}
MACHINES = ("h200", "h200,link=1")  # keys are gathered; heads are exchanged, for on that machine a gather takes longer

# Whose forward is not one graph: the classes of their blocks where the model does not name them, and why.
BLOCKS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "hunyuan-video-framepack-dit": (
        ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
        "cuts the text to as many tokens as a mask holds",
    ),
    "hunyuan-video1.5-dit": ((), "picks text tokens by masks"),
    "motif-video-dit": ((), "has submodules with forward hooks"),
    "kandinsky5-dit": ((), "has submodules with forward hooks"),
    "qwen-image-2.1-dit": ((), "reads from a mask where images are"),
    "hunyuan-image-dit": ((), "picks text tokens by masks"),
    "lumina2-dit": (("Lumina2TransformerBlock",), "cuts the text to as many tokens as a mask holds"),
    "omnigen-dit": (("OmniGenBlock",), "takes one of two rotary scales by the largest position id"),
}
# What is not sharded, and why.
UNSHARDED: Mapping[str, str] = {
    "mochi-dit": "its attention drops masked text tokens, so that how many there are is known by value only",
    "hidream-dit": "its mixture of experts counts the tokens of each in numpy",
}


@lru_cache(maxsize=1)
def recorded(name: str, size: str) -> tuple[Call, ...]:
    """The calls that the unsharded model makes."""
    case = load(name, dtype=torch.float64, size=latents(name, size))
    classes, why = BLOCKS.get(name, ((), ""))
    if classes:
        case.model._repeated_blocks = list(classes)
    calls = record(case, how("h200"), regions="blocks" if why else "whole", strict="on")
    outputs = [x for call in calls for x in call.outputs if isinstance(x, torch.Tensor) and x.numel()]
    assert all(x.isfinite().all() and x.any() for x in outputs)
    return calls


def latents(name: str, size: str) -> tuple[int, ...] | None:
    if size == "own":
        return None
    patch, frames = 1 if name in NO_PATCHES else 2, len(TRANSFORMERS[name].tiny_size.latent) - 2
    usual = {"odd": (5,) * frames + (5 * patch, 7 * patch), "few": (1,) * frames + (patch, 2 * patch)}
    return SIZES.get((name, size), usual[size])


def how(machine: str, blocks: bool = False) -> Options:
    return parse_options({"shard": "sequence", "machine": machine, "gather": "off" if blocks else "on"}, {})


def sharded(name: str, size: str, shape: tuple[int, ...], machine: str) -> Outcome:
    return replay(recorded(name, size), shape, how(machine, name in BLOCKS))


def cases() -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """(model, size, mesh, machine): all, or one for each model, in turn."""
    every = [(size, mesh) for size in MESHES for mesh in MESHES[size]]
    models = [name for name in names("transformer") if name not in UNSHARDED]
    if settings.default.max_examples >= 1000:  # the profile `deep`
        found = [(name, *one, machine) for name in models for one in every for machine in MACHINES]
    else:  # ten meshes and a turn of three machines, so that each comes with each
        turn = zip(cycle(every), cycle((*MACHINES, MACHINES[1])), strict=False)
        found = [(name, *one, machine) for name, (one, machine) in zip(models, turn, strict=False)]
    for name, size, mesh, machine in found:
        batch = TRANSFORMERS[name].tiny_size.batch
        yield name, size, mesh if len(mesh) == 1 or batch >= mesh[0] else mesh[1:], machine


@pytest.mark.parametrize(("name", "size", "shape", "machine"), list(cases()), ids=str)
def test_sharded_equals_unsharded(name: str, size: str, shape: tuple[int, ...], machine: str) -> None:
    outcome = sharded(name, size, shape, machine)
    assert outcome.error <= FLOAT64_BOUND, str(outcome)
    assert outcome.cuts and not outcome.computed_whole, str(outcome)


def test_ranks_without_tokens_meet_the_others_in_order() -> None:
    """Their graphs are of another shape: the moments and sums of linear attention must still come in one order."""
    outcome = sharded("sana-video-dit", "few", (5,), MACHINES[1])
    assert outcome.error <= FLOAT64_BOUND and outcome.fetches["partial sums"]


def test_a_product_with_a_float32_constant_is_lifted() -> None:
    third = torch.full((3, 3), 1 / 3)
    x = torch.randn(2, 3, dtype=torch.float64)
    gm = capture(lambda x: torch.einsum("ab,bc->ac", x.float(), third), x).gm
    assert lift_float32(gm) == 1
    (out,) = torch.fx.Interpreter(gm).run(x)
    assert torch.equal(out, x @ third.double())


@pytest.mark.parametrize("name", UNSHARDED)
def test_what_is_not_sharded(name: str) -> None:
    """Each for the reason that the table gives: the text's length, and numpy."""
    if name == "mochi-dit":
        outcome = sharded(name, "own", (3,), MACHINES[0])
        assert not outcome.cuts and list(outcome.computed_whole) == [f"shard: {NO_TOKENS}"]
    else:
        with pytest.raises(PvaeError, match="numpy"):
            recorded(name, "own")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_forward_that_is_no_one_graph(name: str) -> None:
    with pytest.raises(PvaeError, match="decides by a tensor's value|has forward hooks"):
        record(load(name), how(MACHINES[0]), regions="whole", strict="on")


def test_the_turn_covers_every_mesh_size_and_machine() -> None:
    every = {(size, mesh, machine) for size in MESHES for mesh in MESHES[size] for machine in MACHINES}
    assert {case[1:] for case in cases()} >= every


def test_the_table_is_of_this_zoo() -> None:
    text = TABLE.read_text()
    rows = re.findall(r"^\| (\S+) \| (\w+) \| (one graph|blocks) ", text, re.MULTILINE)
    models = [name for name in names("transformer") if name not in UNSHARDED]
    assert rows == [(n, TRANSFORMERS[n].cls, "blocks" if n in BLOCKS else "one graph") for n in models]
    for name, why in [*UNSHARDED.items(), *((name, why) for name, (_, why) in BLOCKS.items())]:
        assert f"- {name}: {why}" in text
    classes = {cls for _, cls, _ in rows}
    assert f"{len(rows)} models of {len(classes)} classes" in text


def row(name: str, outcome: Outcome) -> str:
    """A line of the table."""
    kinds = " | ".join(str(outcome.fetches[kind]) for kind in ("heads", "exchange", "partial sums", "gather"))
    scope = "blocks" if name in BLOCKS else "one graph"
    return f"| {name} | {TRANSFORMERS[name].cls} | {scope} | {outcome.error:.0e} | {outcome.repeated:.0%} | {kinds} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [name for name in names("transformer") if name not in UNSHARDED]:
        print(row(name, sharded(name, "odd", (3,), MACHINES[1])), flush=True)
