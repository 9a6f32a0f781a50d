"""pvae: compiler passes that make diffusion VAEs and DiTs fast on one GPU and exact on many, without touching model code.

model = torch.compile(model, backend="pvae", options={...})   # nothing has to be imported for this
pvae.compile(vae, **options)                                   # in place, one graph for each kind of call
fn = pvae.main_rank(fn)                                        # rank 0 alone runs it, all ranks have its result
print(pvae.report(vae))                                        # what each pass did, and what it refused and why
"""

from __future__ import annotations

import torch

from pvae.backend import REGISTRY, PvaeError, PvaeWarning, reset
from pvae.main_rank import main_rank
from pvae.module import compile, refresh, restore
from pvae.options import OptionError, Options
from pvae.passes.pipeline import PipelineError
from pvae.report import GraphReport, ModelReport

__version__ = "0.1.0"
__all__ = [
    "GraphReport",
    "ModelReport",
    "OptionError",
    "Options",
    "PipelineError",
    "PvaeError",
    "PvaeWarning",
    "compile",
    "main_rank",
    "refresh",
    "report",
    "reset",
    "restore",
]


def report(model: torch.nn.Module | None = None) -> ModelReport:
    """What each pass did at every compile of `model` (of any model of this process if None)."""
    return REGISTRY.find(model)
