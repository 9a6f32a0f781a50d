"""diffusers' own GlmImagePipeline, not a line of it changed, on two ranks: making a picture, and editing one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pvae
from tests.ranks import on_threads

pytest.importorskip("diffusers")
pytest.importorskip("transformers.models.glm_image")
from PIL import Image

from pvae.tools.glm_image_stages import PRESETS, build, prior


def test_the_pipeline_itself() -> None:
    """Its KV caches, which an edit writes and every step reads or skips, are arguments of every block."""
    preset = PRESETS["tiny"]
    with torch.no_grad(), torch.random.fork_rng():
        pipeline = build(preset, torch.device("cpu"), torch.float64)
        written = prior(pipeline, preset, "a 'word'", 1)
    prompt, none = written.glyphs.split(1)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    edit = {
        "image": [Image.fromarray(pixels)],
        "prior_token_image_ids": [torch.arange(8)],
        "source_image_grid_thw": [torch.tensor([[1, 2, 4]])],
    }

    def run(pipeline: Any, **more: Any) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=none,
            prior_token_ids=written.tokens,
            height=32 * written.rows,
            width=32 * written.columns,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
            **more,
        )[0]

    wanted = [run(pipeline), run(pipeline, **edit)]
    assert not wanted[0].equal(wanted[1])
    pipelines = [copy.deepcopy(pipeline) for _ in range(2)]

    def on_rank(rank: int) -> list[Tensor]:
        mine = pipelines[rank]
        pvae.compile(mine.transformer, shard="sequence", engine="eager", strict="on")
        pvae.compile(mine.vae, shard="halo", engine="eager", strict="on")
        return [run(mine), run(mine, **edit)]

    for got in on_threads(2, on_rank):
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # latents are rounded to float32 at each step
    cuts = [p.counters for g in pvae.report(pipelines[0].transformer).graphs for p in g.passes if p.name == "shard"]
    assert cuts and all(sum(c.values()) for c in cuts), "every kind of call is sharded"
