"""Which submodules of a model `pvae.compile` takes."""

from __future__ import annotations

from torch import nn

from pvae.options import OptionError


def regions(model: nn.Module, choice: str = "auto") -> dict[str, nn.Module]:
    """The submodules that are compiled, by the option `regions`; the model itself has the empty name.

    `auto` is the encoder and decoder of an autoencoder, the repeated blocks of a diffusers transformer, else the whole.
    Raises OptionError for `blocks` of a model that names none.
    """
    if choice == "whole":
        return {"": model}
    parts = {name: getattr(model, name, None) for name in ("encoder", "decoder")}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if found and choice == "auto":
        return found
    blocks = repeated_blocks(model)
    if choice == "blocks" and not blocks:
        likely = sorted({type(m).__name__ for parent in model.modules() for m in _alike(parent)})
        raise OptionError(
            f"regions='blocks': {type(model).__name__} names no repeated blocks; regions='whole' compiles it as one graph, "
            f"or set model._repeated_blocks to class names of submodules, such as {likely or ['TransformerBlock']}"
        )
    return blocks or {"": model}


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules whose classes `model._repeated_blocks` names, as diffusers' regional compilation does."""
    classes = getattr(model, "_repeated_blocks", None) or ()
    return {name: m for name, m in model.named_modules() if name and type(m).__name__ in classes}


def _alike(module: nn.Module) -> list[nn.Module]:
    """What a list of submodules holds several of, with submodules of their own: repeated blocks, most likely."""
    children = list(module.children()) if isinstance(module, nn.ModuleList) else []
    return [c for c in children if any(c.children()) and [type(d) for d in children].count(type(c)) > 1]
