"""The private parts of torch: each does on this version what the rest of pvae takes for granted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pvae.runtime import torch_compat


def test_it_exports_what_exists() -> None:
    assert all(hasattr(torch_compat, name) for name in torch_compat.__all__)


def test_nobody_else_imports_private_names() -> None:
    """`torch._inductor.config` and the like may be used by attribute where public code does so; imports may not."""
    root = Path(__file__).parents[2]
    for folder in ("pvae", "passes", "runtime"):
        for path in (root / folder).glob("*.py"):
            if path.name != "torch_compat.py":
                lines = [line.strip() for line in path.read_text().splitlines()]
                private = [x for x in lines if x.startswith(("from torch._", "import torch._"))]
                assert not private, (path, private)


def test_static_fakes_keep_sizes_and_strides() -> None:
    mode = torch_compat.new_fake_mode()
    for x in (torch.randn(2, 3, 4).transpose(0, 2), torch.randn(0, 3), torch.randn(2, 1).expand(2, 5)):
        fake = torch_compat.static_fake(mode, x)
        assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (x.shape, x.stride(), x.dtype, x.device)
        assert isinstance(fake, torch_compat.FakeTensor) and all(type(n) is int for n in fake.shape)
        again = torch_compat.static_fake(torch_compat.new_fake_mode(), fake)
        assert again.stride() == x.stride() and again.fake_mode is not mode
    with torch.inference_mode():
        made = torch.nn.Linear(2, 2).weight
    assert torch_compat.static_fake(mode, made).shape == (2, 2)


def test_functional_graph_turns_writes_into_copies() -> None:
    mode = torch_compat.new_fake_mode()

    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        x[0] = 1
        z = torch.nn.functional.layer_norm(y, (4,))
        return [z.add_(x)]

    with mode:
        gm, mutated = torch_compat.functional_graph(run, [torch.empty(2, 4), torch.empty(2, 4)], stack_traces=True)
    assert mutated == [0]
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.layer_norm.default in targets, "composites stay whole"
    assert not any(t._schema.is_mutable for t in targets if isinstance(t, torch._ops.OpOverload))


def test_conv_backend_has_a_name() -> None:
    x, w = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64), torch.randn(4, 4, 3, 3, 3, dtype=torch.float64)
    assert torch_compat.conv_backend(x, w, None, (1, 1, 1), (1, 1, 1), (1, 1, 1), 1) == "Slow3d"
    mode = torch_compat.new_fake_mode()
    with mode:
        fakes = [torch.empty(t.shape, dtype=t.dtype) for t in (x, w)]
        assert torch_compat.conv_backend(*fakes, None, (1, 1, 1), (1, 1, 1), (1, 1, 1), 1) == "Slow3d"


def test_current_frame_outside_dynamo() -> None:
    assert torch_compat.current_frame() == (None, None)
