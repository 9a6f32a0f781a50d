"""The arguments that every model command of the CLI shares, stated once, and how they become a `Request`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from pvae.options import NAMES, parse_options
from pvae.tools.model_run import Request, dtype_named, options_named, size_named

T = TypeVar("T")
_MODEL, _COMPILE = "Model", "Compile"

Json = Annotated[bool, typer.Option("--json", help="Machine-readable on stdout, and nothing else there.")]


def _build(
    model: Annotated[
        str, typer.Argument(help="Zoo name, diffusers:ClassName or package.module:factory.", show_default=False)
    ],
    part: Annotated[
        str | None,
        typer.Option(help="decode (default) or encode of an autoencoder, forward of others.", rich_help_panel=_MODEL),
    ] = None,
    preset: Annotated[str, typer.Option(help="tiny, or full (as published).", rich_help_panel=_MODEL)] = "tiny",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64.", rich_help_panel=_MODEL)
    ] = "float32",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU if there is one.", rich_help_panel=_MODEL)
    ] = "auto",
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels, as 9x64x96 (frames, height, width) or 64x96; a transformer's latents.", rich_help_panel=_MODEL
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.", rich_help_panel=_MODEL)] = 0,
    engine: Annotated[str | None, typer.Option(help="inductor or eager.", rich_help_panel=_COMPILE)] = None,
    passes: Annotated[
        str | None, typer.Option(help="Pipeline, as canonicalize,fold_pad.", rich_help_panel=_COMPILE)
    ] = None,
    disable: Annotated[str | None, typer.Option(help="Passes to leave out: a,b.", rich_help_panel=_COMPILE)] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", help=f"KEY=VALUE, of {', '.join(NAMES)}.", rich_help_panel=_COMPILE),
    ] = None,
    default_engine: str | None = None,
) -> Request:
    given = options_named(option or [], {"engine": engine, "passes": passes, "disable": disable})
    if default_engine is not None:
        given.setdefault("engine", default_engine)
    return Request(
        model, part, preset, dtype_named(dtype), device, size_named(size) if size else None, seed, parse_options(given)
    )


def model_command(
    app: typer.Typer, *, without: tuple[str, ...] = (), default_engine: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `command(request, **own)` with the shared arguments, less those in `without`, before its own ones."""

    def register(command: Callable[..., None]) -> Callable[..., None]:
        hidden = (*without, "default_engine")
        shared = [p for n, p in inspect.signature(_build, eval_str=True).parameters.items() if n not in hidden]
        own = [p for n, p in inspect.signature(command, eval_str=True).parameters.items() if n != "request"]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            arguments = {p.name: given.pop(p.name) for p in shared}
            command(_build(**arguments, default_engine=default_engine), **given)

        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared, *own)]
        run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in keyword}
        del run.__wrapped__
        return app.command()(run)

    return register


def comma_list(text: str, read: Callable[[str], T]) -> list[T]:
    """`a,b` -> [read("a"), read("b")]."""
    return [read(item.strip()) for item in text.split(",") if item.strip()]
