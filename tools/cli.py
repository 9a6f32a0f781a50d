"""The command line `pvae`: arguments in, printing out; the work is done in the modules beside this one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import pvae
from pvae.module import compile_with
from pvae.passes.pipeline import Pipeline
from pvae.passes.tuning_store import TuningStoreError
from pvae.report import ModelReport
from pvae.tools import show
from pvae.tools.bisect import bisect as find_culprit
from pvae.tools.bisect import diff_lines
from pvae.tools.check import Checked, Subject, Trial
from pvae.tools.check import check as run_checks
from pvae.tools.check import requests as check_requests
from pvae.tools.cli_options import Json, comma_list, model_command
from pvae.tools.coverage import complete, cover, markdown
from pvae.tools.doctor import BROKEN, examine
from pvae.tools.model_run import Request, RequestError, Trace, dtype_named, size_named, trace_shapes
from pvae.tools.plan import plan_worlds, world_named
from pvae.tools.plan_picture import picture
from pvae.tools.plan_text import details, overview
from pvae.tools.timing import measure
from pvae.tools.tune import tune as tune_model
from pvae.tools.zoo import Unsupported
from pvae.tools.zoo import names as zoo_names

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compiler passes for diffusion VAEs and DiTs: see what they do to a model, check it, and find what is wrong.",
    epilog="Exit code: 0 good, 1 the check failed, 2 usage. Every command takes --json; docs/cli.md has its fields.",
)
USAGE_ERROR: Any = typer.BadParameter.__base__  # of a missing argument, an unknown option; typer does not export it
Graph = Annotated[int | None, typer.Option(help="Only this graph.")]
Strides = Annotated[bool, typer.Option("--strides", help="Show device and strides of every value.")]


def emit(data: dict[str, Any]) -> None:
    """The one JSON object of a command."""
    print(json.dumps(data, indent=2, default=str, allow_nan=False))


def numbered(traces: list[Trace], only: int | None) -> list[tuple[int, Trace]]:
    if only is not None and not 0 <= only < len(traces):
        raise RequestError(f"--graph {only} does not exist; valid: {', '.join(map(str, range(len(traces))))}")
    return [(n, t) for n, t in enumerate(traces) if only in (None, n)]


@app.callback(invoke_without_command=True)
def version(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(pvae.__version__)
        raise typer.Exit


@app.command()
def passes(
    pipeline: Annotated[str | None, typer.Option(help="Check and show this pipeline text instead.")] = None,
    as_json: Json = False,
) -> None:
    """The pipeline in order: what each pass does, its settings, and how exact it is."""
    chosen = Pipeline.default() if pipeline is None else Pipeline.parse(pipeline)
    if as_json:
        steps = [
            {
                "name": s.pass_.name,
                "summary": s.pass_.summary,
                "settings": dict(s.pass_.options),
                "chosen": dict(s.settings),
                "exact": s.pass_.exact,
            }
            for s in chosen.steps
        ]
        emit({"pipeline": str(chosen), "passes": steps})
    else:
        show.console().print(show.pipeline_table(chosen))
        print(f"\n{chosen}")


@model_command(app)
def run(
    request: Request,
    repeat: Annotated[int, typer.Option(min=1, help="Timed calls; the median counts.")] = 5,
    as_json: Json = False,
) -> None:
    """Run a model eager and compiled: time, peak memory on a GPU, and what each pass did."""
    case, device = request.load(), request.torch_device
    eager = measure(case.run, device, repeat)
    compile_with(case.model, request.options)
    ours = measure(case.run, device, repeat)
    report = pvae.report(case.model)
    if as_json:
        speedup = eager.median_s / ours.median_s
        sides = {"eager": asdict(eager), "pvae": asdict(ours)}
        emit({"request": request.to_dict(), **sides, "speedup": speedup, "report": report.to_dict()})
        return
    print(f"{report}\n")
    show.console().print(show.timings({"eager": eager, f"pvae, engine {request.options.engine}": ours}))
    print(f"\n{eager.median_s / ours.median_s:.2f} times as fast as eager on {device}")


@model_command(app)
def explain(
    request: Request,
    every: Annotated[bool, typer.Option("--all", help="Every rewrite and refusal, by node.")] = False,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """What was rewritten and what was left alone, and why; each convolution's forms. By shapes alone."""
    traces = numbered(trace_shapes(request), graph)
    reports = [t.report for _, t in traces if t.report is not None]
    if as_json:
        forms = [{"captured": dict(t.stages[0].forms), "final": dict(t.stages[-1].forms)} for _, t in traces]
        graphs = ModelReport(reports).to_dict()["graphs"]
        numbers = [n for n, _ in traces]
        merged = [{"graph": n, **g, "convolutions": f} for n, g, f in zip(numbers, graphs, forms, strict=True)]
        emit({"request": request.to_dict(), "graphs": merged})
        return
    out = show.console()
    for (number, trace), report in zip(traces, reports, strict=True):
        nodes = f"{report.nodes_before} -> {report.nodes_after} nodes"
        print(f"graph {number}: {trace.name}, {nodes}; {show.forms(trace)}")
        for note in report.notes:
            print(f"  note: {note}")
        if every:
            out.print(show.every_record(trace))
    shown = [t for _, t in traces]
    if not every:
        print()
        out.print(show.explained(shown))
    if any(p.decisions for r in reports for p in r.passes):
        print()
        out.print(show.decisions(shown))


@model_command(app)
def tune(
    request: Request,
    again: Annotated[bool, typer.Option("--again", help="Measure what the store knows already too.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no convolution after so many.")] = 3600,
    configs: Annotated[int, typer.Option(min=1, help="Of taps, tried at most for each convolution.")] = 12,
    as_json: Json = False,
) -> None:
    """Time each convolution's forms on this device; kept on disk."""
    started: list[tuple[Path, int, int]] = []

    def began(path: Path, count: int, known: int) -> None:
        started.append((path, count, known))
        show.console(stderr=True).print(f"{count} convolutions, {known} of them known to {path}", style="dim")

    found = []
    for one in tune_model(request, again=again, seconds=seconds, configs=configs, began=began):
        found.append(one)
        if not as_json and one.trial is not None:
            show.console().print(show.tuned(one), soft_wrap=True, markup=False)
    ((path, count, _),) = started
    left = count - len(found)
    if as_json:
        emit({"request": request.to_dict(), "store": path, "convolutions": [t.to_dict() for t in found], "left": left})
    elif left:
        print(f"{left} convolutions left after {seconds:g} seconds; run it again to go on")


@model_command(app)
def dump(
    request: Request,
    after: Annotated[str | None, typer.Option(help="A pass, or captured; default: at the end.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every stage that changed something.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write files here, as graph0/001_canonicalize.txt.", show_default=False)
    ] = None,
    graph: Graph = None,
    strides: Strides = False,
    as_json: Json = False,
) -> None:
    """The graph as text: one node a line, with its type and the model's line. By shapes alone."""
    if every and after is not None:
        raise RequestError("--all and --after exclude each other")
    found: list[dict[str, Any]] = []
    for number, trace in numbered(trace_shapes(request, strides=strides), graph):
        for stage in [s for s in trace.stages if s.changed] if every else [trace.stage(after)]:
            entry = {"graph": number, "name": trace.name, "index": stage.index, "stage": stage.name, "text": stage.text}
            if out is not None:
                path = out / f"graph{number}" / f"{stage.index:03d}_{stage.name}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(stage.text)
                entry["path"] = str(path)
            found.append(entry)
    if as_json:
        emit({"request": request.to_dict(), "stages": found})
        return
    for entry in found:
        if out is not None:
            print(entry["path"])
        else:
            print(f"# graph {entry['graph']}: {entry['name']}, {entry['stage']}\n{entry['text']}")


@model_command(app)
def diff(
    request: Request,
    only: Annotated[
        str | None, typer.Option("--pass", help="A pass; default: each that changed something.", show_default=False)
    ] = None,
    context: Annotated[int, typer.Option("-U", "--context", min=0, help="Unchanged lines around a change.")] = 1,
    graph: Graph = None,
    strides: Strides = False,
    as_json: Json = False,
) -> None:
    """What each pass changed in the graph, as a unified difference of its text. By shapes alone."""
    found: list[dict[str, Any]] = []
    for number, trace in numbered(trace_shapes(request, strides=strides), graph):
        chosen = trace.stages[1:] if only is None else [trace.stage(only)]
        for stage in chosen:
            before = trace.stages[max(stage.index - 1, 0)]
            lines = diff_lines(before.text, stage.text, context)
            if lines:
                found.append({"graph": number, "name": trace.name, "pass": stage.name, "diff": lines})
    if as_json:
        emit({"request": request.to_dict(), "changes": found})
        return
    console = show.console()
    for entry in found:
        print(f"# graph {entry['graph']}: {entry['name']}, {entry['pass']}")
        for line in show.difference(entry["diff"]):
            console.print(line, soft_wrap=True)
    if not found:
        print("nothing changed")


@model_command(app, without=("part", "dtype", "size", "seed"))
def check(
    request: Request,
    parts: Annotated[str, typer.Option(help="Of decode, encode.")] = "decode,encode",
    sizes: Annotated[str, typer.Option(help="Pixels, as 9x64x96,13x32x48; default: the preset's.")] = "",
    dtypes: Annotated[str, typer.Option(help="Of float32, bfloat16, float16, float64.")] = "float32,bfloat16",
    seeds: Annotated[str, typer.Option(help="Of weights and inputs.")] = "0",
    as_json: Json = False,
) -> None:
    """Compare with float64: pvae may err 1.25 times as much as eager does. MODEL may be `all`: every autoencoder of the zoo."""
    try:
        numbers = comma_list(seeds, int)
    except ValueError:
        raise RequestError(f"--seeds {seeds!r} is not a list of whole numbers, such as 0,1") from None
    wanted = check_requests(
        request,
        comma_list(parts, str),
        comma_list(sizes, size_named) or [None],
        comma_list(dtypes, dtype_named),
        numbers,
    )
    if not wanted:
        raise RequestError("nothing to check: --parts, --dtypes and --seeds must each name one at least")
    lines: list[Checked] = []
    if not as_json:
        print(show.checked_header())
    for line in run_checks(wanted):
        lines.append(line)
        if not as_json:
            show.console().print(show.checked_row(line), soft_wrap=True)
    bad = sum(not line.ok for line in lines)
    if as_json:
        emit({"ok": not bad, "engine": request.options.engine, "results": [line.to_dict() for line in lines]})
    else:
        skipped = sum(line.trial is None for line in lines)
        print(f"\n{len(lines) - bad - skipped} right, {bad} wrong, {skipped} skipped (engine {request.options.engine})")
    raise typer.Exit(bool(bad))


@app.command()
def coverage(
    models: Annotated[str, typer.Argument(help="Names, separated by commas, or all.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Write the table here, as Markdown.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Modulation chains (norm, scale, shift, gate) of the zoo's transformers: how many are fused, and why others not."""
    found = []
    for name in zoo_names("transformer") if models == "all" else comma_list(models, str):
        case = Request(name, part="forward", device="cpu").load()
        found.append(cover(case, {"engine": "eager", "modulation": "on"}))
        if not as_json:
            print(found[-1].line(), flush=True)
    if out is not None:
        out.write_text(markdown(found))
    if as_json:
        emit({"ok": complete(found), "models": [f.to_dict() for f in found]})
    raise typer.Exit(not complete(found))


@model_command(app, default_engine="eager")
def bisect(request: Request, as_json: Json = False) -> None:
    """Find the pass, and in it the single rewrite, that breaks a model. Interprets unless --engine inductor."""
    trials: list[dict[str, Any]] = []
    console = show.console()

    def say(what: str, trial: Trial) -> None:
        trials.append({"what": what, **trial.to_dict()})
        if not as_json:
            console.print(show.trial_line(what, trial), soft_wrap=True)

    culprit = find_culprit(Subject(request.load()), request.options, say)
    if as_json:
        emit({"request": request.to_dict(), **culprit.to_dict(), "trials": trials})
    else:
        print(f"\n{show.verdict(culprit)}")
        for line in show.difference(culprit.diff):
            console.print(line, soft_wrap=True)
    raise typer.Exit(culprit.kind != "good")


@model_command(app)
def plan(
    request: Request,
    world: Annotated[str, typer.Option(help="Numbers of ranks.")] = "1,2,4,8",
    shard: Annotated[str | None, typer.Option(help="halo, patch, sequence, none, or auto: what costs least.")] = None,
    shard_dims: Annotated[str | None, typer.Option(help="auto, h (rows), w (columns), hw.")] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="A preset and constants of your own, as h200,memory=4e12 (an unknown one lists them).",
            show_default="h200",
        ),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the partitions here.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """What sharding over so many ranks does and costs: partition, exchanges, memory, time. By shapes alone, no GPU."""

    def say(text: str) -> None:
        show.console(stderr=True).print(f"tracing {text}", style="dim")

    ranks = comma_list(world, world_named)
    model, traced, plans = plan_worlds(request, ranks, shard, shard_dims, machine, say)
    if svg is not None:
        svg.write_text(picture(plans))
    if as_json:
        emit({"request": traced.to_dict(), "machine": asdict(model), "plans": [p.to_dict() for p in plans]})
        return
    out = show.console()
    print(f"machine {model.name}: {model.source}\ngraphs as on {traced.torch_device}, {plans[0].input_text}\n")
    out.print(overview(plans))
    for found in plans:
        print()
        for part in details(found):
            out.print(part, soft_wrap=isinstance(part, str), markup=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, compiler, settings, known traps, and a self-test of five seconds."""
    found = []
    for line in examine():
        found.append(line)
        if not as_json:
            show.console().print(show.finding(line), soft_wrap=True)
    broken = any(line.state == BROKEN for line in found)
    if as_json:
        emit({"ok": not broken, "findings": [asdict(line) for line in found]})
    raise typer.Exit(broken)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and figures.")] = Path("demo-out"),
    engine: Annotated[str | None, typer.Option(help="inductor or eager.", show_default="inductor")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU if there is one.")] = "auto",
    shard: Annotated[
        str | None,
        typer.Option(help="Instead, decode the photograph in pieces: halo, patch, tile, or several of them."),
    ] = None,
    world: Annotated[int | None, typer.Option(min=1, help="Ranks, all on one device.", show_default="4")] = None,
    shard_dims: Annotated[
        str | None, typer.Option(help="auto, h (rows), w (columns), hw; of halo and patch.", show_default="auto")
    ] = None,
    patch_context: Annotated[
        str | None, typer.Option(help="Latents around a patch, a row each.", show_default="0,2,4,8")
    ] = None,
    as_json: Json = False,
) -> None:
    """A photograph and a clip through a small video VAE, eager and compiled, side by side."""
    from pvae.tools.demo.run import run_demo  # needs the [models] extra, which nothing else here does
    from pvae.tools.demo.shard import run_shard, shard_request

    pieces = shard_request(shard, world, shard_dims, patch_context, engine)
    kind, console = Request("", device=device).torch_device.type, show.console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    if pieces is None:
        result = run_demo(out, kind, engine or "inductor", console)
        if as_json:
            emit(asdict(result))
        return
    sharded = run_shard(out, kind, pieces, console)
    if as_json:
        emit({"shard": asdict(sharded)})
    raise typer.Exit(not sharded.ok)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `pvae`. What a person got wrong is one line on stderr; with --json also `{"error": ...}`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    try:
        sys.exit(app(arguments, standalone_mode=not as_json))
    except USAGE_ERROR as error:  # with --json; else typer has printed it
        code, text = 2, error.format_message()
    except typer.Abort:  # likewise
        code, text = 1, "aborted"
    except (RequestError, Unsupported, pvae.OptionError, pvae.PipelineError, TuningStoreError) as error:
        code, text = 2, str(error)
    except pvae.PvaeError as error:
        code, text = 1, str(error)
    show.console(stderr=True).print(f"pvae: {text}", style="red", markup=False, soft_wrap=True)
    if as_json:
        emit({"error": text})
    sys.exit(code)


if __name__ == "__main__":
    main()
