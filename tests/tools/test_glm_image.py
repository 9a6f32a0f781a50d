"""The GLM-Image example, as a person runs it: torchrun with three gloo ranks, and one device, in float64. (Two ranks, block by
block: `test_glm_image_pipeline.py`.)"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers.models.glm_image")
from pvae.testing import FLOAT64_BOUND, relative_error
from pvae.tools import glm_image
from pvae.tools.glm_image_stages import PRESETS, build, prior

ASKED = ["--device", "cpu", "--dtype", "float64", "--check", "--seed", "1"]


def _files(where: Path) -> list[str]:
    return ["--save", str(where / "picture.pt"), "--json", str(where / "figures.json")]


def _read(where: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return torch.load(where / "picture.pt"), json.loads((where / "figures.json").read_text())


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    where = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", ["glm_image", *ASKED, *_files(where)])
        with torch.no_grad():
            assert glm_image.main() == 0
    return _read(where)


def test_one_device(one_device: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    saved, figures = one_device
    assert figures["ranks"][0]["written"] == figures["written"]
    assert figures["exchanges"] == {"transformer": {}, "vae": {}}
    assert figures["check"]["picture"] == {"error": 0.0, "eager": 0.0, "allowed": FLOAT64_BOUND}
    assert [*saved["picture"].shape] == [1, 3, *figures["pixels"]]
    assert saved["picture"].std() > 0.1


@pytest.mark.slow
def test_ranks(one_device: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path) -> None:
    """Rank 0 alone writes; the picture is the one that one device makes, and was made in pieces."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    example = ["-m", "pvae.tools.glm_image", *ASKED, *_files(tmp_path), "--regions", "whole"]
    done = subprocess.run([*torchrun, *example], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wanted, alone), (saved, figures) = one_device, _read(tmp_path)
    assert saved["tokens"].equal(wanted["tokens"]) and figures["pixels"] == alone["pixels"]
    for name in ("latents", "picture"):
        assert relative_error(saved[name], wanted[name]) <= FLOAT64_BOUND
        assert figures["check"][name]["error"] <= FLOAT64_BOUND
    assert figures["check"]["picture"]["error"] > 0, "sums over pieces round otherwise: it was not sharded"
    main, *others = figures["ranks"]
    assert main["written"] == figures["written"] and main["main_mib"] == alone["ranks"][0]["main_mib"]
    assert len(others) == 2
    for other in others:
        assert other["written"] == other["main_mib"] == 0, "it has no weights and did no work of the first stage"
        assert len(other["denoise_s"]) == 4 and len(other["decode_s"]) == 3
    assert all(sum(kinds.values()) for kinds in figures["exchanges"].values())


def test_the_length_depends_on_what_is_drawn() -> None:
    preset = PRESETS["tiny"]
    with torch.no_grad(), torch.random.fork_rng():
        pipeline = build(preset, torch.device("cpu"), torch.float32)
        found = [prior(pipeline, preset, "a 'word'", seed) for seed in range(6)]
        again = prior(pipeline, preset, "a 'word'", 0)
    assert again.tokens.equal(found[0].tokens)
    assert len({f.rows for f in found}) > 2
    for f in found:
        assert 1 <= f.rows <= preset.rows and f.columns == preset.columns
        assert f.tokens.shape == (1, 4 * f.rows * f.columns)
        assert int(f.tokens.min()) >= 0 and int(f.tokens.max()) < preset.writer.codebook
        assert f.rows == min(f.written - (f.rows < preset.rows), preset.rows * preset.columns) // preset.columns
        assert f.glyphs.shape[0] == 2 and f.glyphs.isfinite().all()


def test_the_full_preset_exists() -> None:
    """Its four models can be built, on `meta`, and fit each other."""
    preset = PRESETS["full"]
    pipeline = build(preset, torch.device("meta"), torch.bfloat16)
    dit, vae, writer = pipeline.transformer, pipeline.vae, pipeline.vision_language_encoder
    assert dit.config.in_channels == dit.config.out_channels == vae.config.latent_channels == 16
    assert dit.config.prior_vq_quantizer_codebook_size == preset.writer.codebook
    assert dit.config.text_embed_dim == pipeline.text_encoder.config.d_model
    assert pipeline.vae_scale_factor == 8
    rotary = writer.model.language_model.rotary_emb
    assert 2 * rotary.inv_freq.shape[0] == 64 and sum(rotary.mrope_section) == 32
    assert {p.dtype for p in dit.parameters()} == {torch.bfloat16}


def test_a_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 where the compiled models compute something else."""
    right = glm_image.decode
    wrong = iter([True] * 3 + [False] * 2)
    monkeypatch.setattr(glm_image, "decode", lambda *given: right(*given) * (1 + 1e-9 * next(wrong)))
    monkeypatch.setattr(sys, "argv", ["glm_image", *ASKED, "--steps", "1"])
    with torch.no_grad(), torch.random.fork_rng():
        assert glm_image.main() == 1
    latents, picture = capsys.readouterr().out.splitlines()[-2:]
    assert "latents against one device: error 0.00e+00" in latents
    assert "picture against one device: error 1.00e-09" in picture and "allowed 1.00e-12" in picture


def test_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--preset", "tinny"], "did you mean tiny"),
        (["--dtype", "float63"], "float64"),
        (["--steps", "0"], "--steps 0"),
        (["--device", "cpu", "--regions", "halves"], "regions"),
    ):
        monkeypatch.setattr(sys, "argv", ["glm_image", *arguments])
        with torch.no_grad(), pytest.raises(SystemExit) as ended:
            glm_image.main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "transformers" or n.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "pvae.tools.glm_image_stages")
    with pytest.raises(ImportError, match=r"pip install 'pvae\[models\]'"):
        importlib.import_module("pvae.tools.glm_image_stages")
