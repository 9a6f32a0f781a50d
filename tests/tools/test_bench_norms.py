"""The norm bench compares like with like: what it calls ours and eager are the same function."""

from __future__ import annotations

import pytest
import torch

from pvae.kernels.norm_examples import examples
from pvae.tools.bench_norms import FORMS, Row, parse_shapes, traffic


@pytest.mark.parametrize("name", FORMS)
def test_ours_is_what_eager_computes(name: str) -> None:
    form = FORMS[name]
    o = examples((1, 6, 32), torch.float32, residual=form.residual, select=form.select)
    if form.norm == "none":
        o = o._replace(scale=None, shift=None)
    eager = torch.compile(form.eager, backend="eager", fullgraph=True)(o)
    torch.testing.assert_close(form.ours(o), eager)
    outputs = sum(t.nbytes for t in (eager if isinstance(eager, tuple) else (eager,)))
    assert traffic(form, o) == outputs + sum(t.nbytes for t in o if t is not None)


def test_shapes_and_lines() -> None:
    assert parse_shapes("32760x5120,8x4096x3072") == [(1, 32760, 5120), (8, 4096, 3072)]
    row = Row("norm", (1, 2, 3), "bfloat16", 4_000_000_000, {}, {"eager": 4.0, "max": 2.0, "pvae": 1.0, "copy": 0.9})
    assert "eager  1.00" in row.line() and "90% of copy, 2.00x max-autotune, 2.00x best other" in row.line()
