"""The private parts of torch: each does on this version what the rest of pvae takes for granted."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path

import pytest
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


# Which outputs leave as side effects ---------------------------------------------------------------------------------------


class Box:
    inner: object
    value: object


def _list(x: Tensor, c: list) -> Tensor:
    c[0] = x + 1
    c.append(x + 2)
    return x * 2


def _attributes_and_nested(x: Tensor, c: list) -> dict:
    box = Box()
    box.inner = x + 1
    c[0] = {"a": [box]}
    other = Box()
    other.value = [x * 2]
    return {"out": other}


def _nothing_returned(x: Tensor, c: list) -> None:
    c[0] = x + 1


def _nothing_written(x: Tensor, c: list) -> tuple:
    return x * 2, (x * 3,)


def _returned_too(x: Tensor, c: list) -> tuple:
    c[0], c[1:] = x + 1, [x + 2]
    return x * 2, c[0]


def _returned_as_a_key(x: Tensor, c: list) -> dict:
    c[0] = x + 1
    return {c[0]: 1}


def _returned_in_an_object(x: Tensor, c: list) -> Box:
    box = Box()
    box.value = x + 1
    c[0] = box
    return box


def _returned_by_a_closure(x: Tensor, c: list) -> object:
    y = x + 1
    c[0] = y
    return lambda: y


def _the_list_is_returned(x: Tensor, c: list) -> list:
    c[0] = x + 1
    return c


def _alive_after_a_break(x: Tensor, c: list) -> Tensor:
    kept, c[0] = x + 1, x + 2
    c.append(kept)
    torch._dynamo.graph_break()
    return kept


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_list, 2),
        (_attributes_and_nested, 1),
        (_nothing_returned, 1),
        (_nothing_written, 0),
        (_returned_too, 1),
        (_returned_as_a_key, 0),
        (_returned_in_an_object, 0),
        (_returned_by_a_closure, 0),
        (_the_list_is_returned, 0),
        (_alive_after_a_break, 1),
    ],
)
def test_side_effect_outputs(function: Callable[..., object], expected: int) -> None:
    """`x + n` are what the functions store: those that the answer names, and it names as many as are stored only."""
    answers = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        (output,) = gm.graph.find_nodes(op="output")
        found = torch_compat.side_effect_outputs()
        assert found is not None
        answers.append([output.args[0][i].target for i in sorted(found)])
        return gm

    with torch.no_grad():
        torch.compile(function, backend=backend)(torch.randn(3), [None])
    assert answers == [[operator.add] * expected]


def test_side_effects_on_modules_and_dicts() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("buffer", torch.zeros(3))
            self.caches: list[Tensor | None] = [None, None]
            self.table: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.buffer, self.caches[1], self.table["last"] = x + 1, x + 2, x + 3
            return x * 2

    answers = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        (output,) = gm.graph.find_nodes(op="output")
        answers.append([output.args[0][i].target for i in sorted(torch_compat.side_effect_outputs() or ())])
        return gm

    with torch.no_grad():
        torch.compile(Module(), backend=backend, fullgraph=True)(torch.randn(3))
    assert answers == [[operator.add] * 3]


def test_side_effect_outputs_outside_dynamo() -> None:
    assert torch_compat.side_effect_outputs() is None
