"""What the zoo hands out: a model, its inputs and one deterministic call."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

Call = Callable[[Any, Sequence[torch.Tensor], Mapping[str, object]], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One part of one model, with inputs.

    `regions` are attribute paths of the submodules that a compiler should take; `""` is the model itself. `model` is in
    eval mode and asks for no gradient. `kwargs` go to the call after `inputs`.
    """

    name: str
    preset: str
    part: str
    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    kwargs: Mapping[str, object]
    regions: tuple[str, ...]
    call: Call = field(repr=False)

    def run(self, model: nn.Module | None = None, inputs: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """The part's output, under `no_grad`: pixels for decode, distribution parameters or latents for encode.

        Nothing is sampled, so the same weights and inputs give the same output. `model` and `inputs` stand in for the
        case's own: a compiled copy, another dtype, another size. Lists and mappings are the run's own: a model may keep
        its caches there.
        """
        given = (self.inputs if inputs is None else inputs), self.kwargs
        args, kwargs = torch.utils._pytree.tree_map(lambda leaf: leaf, given)
        with torch.no_grad():
            return self.call(self.model if model is None else model, args, kwargs)

    def cast(self, dtype: torch.dtype) -> "Case":
        """A copy in another dtype with these very weights and inputs.

        The float64 reference of a bfloat16 case is `case.cast(torch.float64)`: loading it in float64 would compare with
        weights that were never rounded.
        """
        model = nn.Module.to(copy.deepcopy(self.model), dtype)
        return replace(self, model=model, inputs=cast(self.inputs, dtype), kwargs=cast(self.kwargs, dtype))


def cast(value: Any, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """`value` with its floating-point tensors in `dtype` and all on `device`, inside tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(cast(item, dtype, device) for item in value)
    if isinstance(value, Mapping):
        return {key: cast(item, dtype, device) for key, item in value.items()}
    return value


def decode(model: Any, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, object]) -> torch.Tensor:
    """Latents to pixels by diffusers' `decode`, tiling and slicing off as they are by default."""
    return model.decode(*inputs, **kwargs, return_dict=False)[0]


def encode(model: Any, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, object]) -> torch.Tensor:
    """Pixels to the distribution's parameters (mean and log variance on dim 1), or to latents where there is none."""
    encoded = model.encode(*inputs, **kwargs, return_dict=False)[0]
    return encoded if isinstance(encoded, torch.Tensor) else encoded.parameters


def forward(model: Any, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, object]) -> torch.Tensor:
    """The module's own output, or the first tensor of a tuple, list or mapping (diffusers' `ModelOutput` is one)."""
    output = model(*inputs, **kwargs)
    if isinstance(output, Mapping):
        output = tuple(output.values())
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, torch.Tensor):
        raise TypeError(f"{type(model).__name__} returned {type(first).__name__}; the zoo needs a tensor first")
    return first


CALLS: Mapping[str, Call] = {"decode": decode, "encode": encode}
