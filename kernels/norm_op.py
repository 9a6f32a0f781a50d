"""Registers a function as a functional `pvae::` op that costs the host little.

`torch.library.custom_op` puts two Python layers between a call and the function, one that records for autograd and one
that looks for aliases among the results; for a norm of ten small operands they cost more than everything else on the way
to the launch. These ops make new results only and are for inference: without the layers, a backward pass through them
warns that it has no formula.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

LIBRARY = torch.library.Library("pvae", "FRAGMENT")


def functional_op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], OpOverload]:
    """Makes of a function `torch.ops.pvae.<its name>.default`, with the schema that its annotations spell.

    `fake` makes the results without values. It is given the arguments by name and takes those that it looks at.
    """

    def define(function: Callable[..., Any]) -> OpOverload:
        name, signature = function.__name__, inspect.signature(function)
        schema = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pvae::{name}", lambda *a, **k: fake(**signature.bind(*a, **k).arguments))
        return getattr(torch.ops.pvae, name).default

    return define


def like_x(x: Tensor, out_dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """The fake of an op that returns y."""
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def like_residual_and_x(
    residual: Tensor, x: Tensor, h_dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """The fake of an op that returns h and y."""
    return like_x(x, h_dtype or residual.dtype), like_x(x, out_dtype)
