"""Registers a function as a functional `pvae::` op that costs the host little.

`torch.library.custom_op` puts two Python layers between a call and the function, one that records for autograd and one
that looks for aliases among the results; for a norm of ten small operands they cost more than everything else on the way
to the launch. These ops make new results only and are for inference: without the layers, a backward pass through them
warns that it has no formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

LIBRARY = torch.library.Library("pvae", "FRAGMENT")


def functional_op(function: Callable[..., Any]) -> OpOverload:
    """`torch.ops.pvae.<name of function>.default`, with the schema that the function's annotations spell."""
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.pvae, name).default
