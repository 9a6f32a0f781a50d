"""`pvae.main_rank`: a part of a model that runs on rank 0 only, and whose results all ranks have.

An autoregressive stage, a text encoder or the drawing of noise is done once; the other ranks do none of its work, hold none
of its activations, and need not have its weights (`meta` parameters). What it returns is the same on every rank, also where
it is random.

    generate = pvae.main_rank(model.generate)        a function, a bound method; as decorator: any Python may be inside
    pvae.main_rank(pipe.text_encoder)                a module: its forward, in place
    pvae.compile(model, main_rank=["text_encoder"])  submodules and methods of a model, by name
    with pvae.main_rank(): ...                       some lines of code that pvae compiles

In a graph (`pvae.compile` traces a function of the first three kinds too, where it can be traced) the region becomes rank
0's own by the pass `main_rank`. Everywhere else the function is called on rank 0, and the others wait for its results: sizes
may depend on data, and whatever can be pickled may be in it besides tensors.
"""

from __future__ import annotations

import difflib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, overload

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pvae.backend import PvaeError
from pvae.options import OptionError, parse_options
from pvae.passes.main_rank import MARK
from pvae.ranks import Ranks, all_ranks, world_size
from pvae.runtime.main_rank import Parcel, receive, send
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.runtime.torch_compat import is_compiling, noting, tracing_by_running

__all__ = ["MainRankFunction", "inside_region", "main_rank", "unwrap", "wrap_named"]


class _Inside(threading.local):
    """Whether this thread is rank 0's and inside a region: one inside another is a part of it."""

    region = False


_INSIDE = _Inside()


@overload
def main_rank(function: None = None, *, timeout: None = None) -> AbstractContextManager[None]: ...
@overload
def main_rank(function: None = None, *, timeout: float) -> Callable[[Callable[..., Any]], MainRankFunction]: ...
@overload
def main_rank(function: Callable[..., Any], *, timeout: float | None = None) -> Any: ...
def main_rank(function: Any = None, *, timeout: float | None = None) -> Any:
    """Give `function` to rank 0: it alone runs it, and every rank returns what it returned.

    Args:
        function: any callable; a module, whose `forward` is then replaced in place (`del module.forward` undoes it); or
            nothing, for `with pvae.main_rank():` and `@pvae.main_rank(timeout=...)`.
        timeout: seconds that the ranks wait for each other to come, and then for rank 0 to be done (default: the option
            `timeout`, and so PVAE_TIMEOUT).

    All ranks must call it, in the same order as all else that they do together. What they pass is not compared: rank 0's
    counts, and the others may pass None. Results arrive on the device of the arguments, else on the current one. With one
    rank, and inside another region, it is an ordinary call.

    An exception is raised as it is on rank 0, and as RankError, with its text, on the others. RankError also where a rank
    does not come. TypeError where a result cannot travel. As a context manager it works in code that is being compiled by
    pvae and in a world of one; elsewhere it raises PvaeError, since Python cannot skip the body of a `with`.
    """
    if function is None and timeout is None:
        return _region()
    if function is None:
        return functools.partial(main_rank, timeout=timeout)
    seconds = parse_options({} if timeout is None else {"timeout": timeout}).timeout
    if isinstance(function, nn.Module):
        function.forward = MainRankFunction(function.forward, seconds, type(function).__qualname__)
        return function
    return MainRankFunction(function, seconds)


def _region() -> AbstractContextManager[None]:
    if is_compiling() or tracing_by_running():
        return noting({MARK: True})
    if _INSIDE.region or world_size() == 1:
        return nullcontext()
    raise PvaeError(
        "`with pvae.main_rank():` is met in code that is not being compiled, and the body of a `with` cannot be skipped on "
        "the other ranks: make it a function, fn = pvae.main_rank(function), or compile what it is in with pvae"
    )


def inside_region() -> bool:
    """Whether rank 0 is running a region, and the other ranks are not."""
    return _INSIDE.region


@contextmanager
def _inside() -> Iterator[None]:
    _INSIDE.region = True
    try:
        yield
    finally:
        _INSIDE.region = False


class MainRankFunction:
    """A function that rank 0 runs for all; see `main_rank`. Methods made of it are bound as usual, and copies of it."""

    def __init__(
        self, function: Callable[..., Any], timeout: float, name: str | None = None, by_option: bool = False
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function = function
        self.timeout = timeout
        self.by_option = by_option
        self.name = name or str(getattr(function, "__qualname__", type(function).__qualname__))

    def __get__(self, owner: Any, kind: type | None = None) -> MainRankFunction:
        return self if owner is None else MainRankFunction(MethodType(self.function, owner), self.timeout)

    @torch.compiler.disable(
        reason="pvae.main_rank(function) runs on rank 0 only, and is a part of no graph of Dynamo's"
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if tracing_by_running():
            with noting({MARK: True}):
                return self.function(*args, **kwargs)
        if _INSIDE.region or world_size() == 1:
            return self.function(*args, **kwargs)
        return self._on_rank_0(all_ranks(self.timeout), args, kwargs)

    def _on_rank_0(self, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (group,), agreement = ranks.mesh.groups, ranks.agreement
        assert group is not None and agreement is not None
        result = parcel = None
        with ranks.guarded(self.name):
            agreement.agree(f"{self.name}, for rank 0 to run", (), ())
            args, kwargs = tree_map_only(ShardedTensor, ShardedTensor.whole, (args, kwargs))  # all take part in this
            if ranks.mesh.rank == 0:
                with _inside():
                    result = self.function(*args, **kwargs)
                try:
                    parcel = Parcel.of(result)
                except TypeError as error:
                    raise TypeError(f"what {self.name} returns cannot go to the other ranks: {error}") from error
            agreement.agree(f"{self.name}, whose result is awaited for the timeout of main_rank", (), ())
            devices = _devices((args, kwargs))
            if parcel is None:
                return receive(group, devices)
            send(parcel, group, devices)
        return result


def _devices(arguments: Any) -> dict[str, torch.device]:
    """The device of each type that the arguments are on; the first counts."""
    found: dict[str, torch.device] = {}
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            found.setdefault(leaf.device.type, leaf.device)
    return found


# --- by name, in a model -------------------------------------------------------------------------------------------------


def wrap_named(model: nn.Module, paths: Sequence[str], timeout: float) -> None:
    """Give the submodules (their forward) and methods of `model` with these dotted names to rank 0, in place.

    Raises OptionError, with the nearest names, for one that there is not.
    """
    found = [_find(model, path) for path in paths]
    for (owner, name), path in zip(found, paths, strict=True):
        owner.__dict__[name] = MainRankFunction(getattr(owner, name), timeout, f"{type(model).__name__}.{path}", True)


def _find(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the name of its method that `path` stands for."""
    parent, _, name = path.rpartition(".")
    modules = dict(model.named_modules(remove_duplicate=False))
    if path in modules and path:
        return modules[path], "forward"
    owner = modules.get(parent)
    if owner is not None and isinstance(getattr(owner, name, None), MethodType | MainRankFunction):
        return owner, name
    known = list(modules)[1:]
    if owner is not None:
        known += [f"{parent}.{n}" if parent else n for n in _own_methods(owner)]
    near = difflib.get_close_matches(path, known, 3, 0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f". It has {', '.join(known[:20])}"
    raise OptionError(f"main_rank: {type(model).__name__} has no submodule or method {path!r}{hint}")


def _own_methods(module: nn.Module) -> list[str]:
    """Its public methods, without those that every module has."""
    return [
        n for n in dir(type(module)) if n[0] != "_" and not hasattr(nn.Module, n) and callable(getattr(type(module), n))
    ]


def unwrap(model: nn.Module) -> None:
    """Undo `wrap_named` on `model`. What its owner gave to rank 0 by `main_rank` stays so."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if not isinstance(value, MainRankFunction) or not value.by_option:
                continue
            if getattr(value.function, "__func__", None) is getattr(type(module), name, None):
                del module.__dict__[name]
            else:
                module.__dict__[name] = value.function
