"""The code in docs/writing-a-pass.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pvae.passes import pipeline

DOCS = Path(__file__).parents[2] / "docs"


def test_writing_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PASSES", pipeline.PASSES)  # what `register` replaces is put back afterwards
    monkeypatch.setattr(pipeline, "BY_NAME", pipeline.BY_NAME)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "writing-a-pass.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "writing-a-pass.md", "exec"), names)
    order = str(pipeline.Pipeline.default()).split(",")
    assert order.index("add_zero") == order.index("conv3d_unfold") - 1
