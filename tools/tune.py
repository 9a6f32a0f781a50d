"""`pvae tune`: measure the forms of a model's convolutions on this device and keep the times in the tuning store.

The convolutions are those of every graph that the model is captured in, as they stand before the policy. They are found by
shapes alone; nothing but single convolutions runs. The most arithmetic comes first, and each is stored once it is measured, so
that a run can be cut short and go on later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from pvae.module import compile_with, compiled_forwards
from pvae.passes.compute_device import ComputeDevice
from pvae.passes.conv_forms import Wanted, possible
from pvae.passes.conv_policy import CONV_POLICY
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.ir import ConvNode
from pvae.passes.tuning_store import OFF, DeviceTable, merge, read, store_path
from pvae.tools.conv_trial import Trial, copy_rate, try_forms
from pvae.tools.model_run import Request, RequestError, shapes_only


@dataclass(frozen=True)
class Site:
    """A convolution of the model: how often it stands in its graphs, and the forms that it could take, or why not."""

    problem: ConvProblem
    count: int
    forms: tuple[str, ...]
    why_not: dict[str, str]


@dataclass(frozen=True)
class Tuned:
    """A site as measured, or as the store already had it (`trial` is None)."""

    site: Site
    trial: Trial | None

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"convolution": str(self.site.problem), "sites": self.site.count}
        if self.trial is None:
            return plain | {"known": True}
        forms = {name: form.to_json() for name, form in self.trial.forms.items()}
        dropped = [{"what": what, "reason": reason} for what, reason in self.trial.dropped]
        return plain | {"known": False, "forms": forms, "dropped": dropped}


def sites(request: Request) -> list[Site]:
    """The distinct convolutions of the requested model with sizes known, most arithmetic first.

    Raises RequestError if the policy is not in the pipeline.
    """
    options = replace(
        request.options, engine="eager", strict="on", conv3d="auto", channels_last="auto", tuning_store=OFF
    )
    if all(step.pass_ is not CONV_POLICY for step in options.pipeline.steps):
        raise RequestError(f"the pipeline has no pass {CONV_POLICY.name}, which reads what tune measures")
    counts: Counter[ConvProblem] = Counter()
    found: dict[ConvProblem, Site] = {}

    def observe(stage: str, gm: GraphModule) -> None:
        if stage != CONV_POLICY.name:
            return
        for node in gm.graph.nodes:
            conv = ConvNode.of(node)
            problem = ConvProblem.of(conv) if conv is not None and conv.ndim in (2, 3) else None
            if conv is None or problem is None:
                continue
            counts[problem] += 1
            if problem not in found:
                reasons = possible(conv, Wanted.of(options))
                names = tuple(name for name, reason in reasons.items() if reason is None)
                found[problem] = Site(problem, 0, names, {n: r for n, r in reasons.items() if r is not None})

    with shapes_only(request):
        case, mode = request.shapes()
        compile_with(case.model, options)
        for forward in compiled_forwards(case.model):
            forward.observe = observe
        with mode:
            case.run()
    every = [replace(site, count=counts[problem]) for problem, site in found.items()]
    return sorted(every, key=lambda s: (-s.problem.flops * s.count, str(s.problem)))


def tune(
    request: Request,
    *,
    again: bool,
    seconds: float,
    configs: int = 12,
    began: Callable[[Path, int, int], None] | None = None,
) -> Iterator[Tuned]:
    """Measure what the store does not know yet (`again`: everything), for at most about so many seconds.

    `configs` of `taps` are tried at most for each convolution. `began` is told the store, and how many convolutions there
    are and are known.

    Raises RequestError where there is no store or the device is not here, TuningStoreError where the store is damaged.
    """
    path, device = store_path(request.options.tuning_store), request.torch_device
    if path is None:
        raise RequestError(f"tuning_store={OFF} leaves nowhere to keep the times; name a file, or leave the default")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"--device {device}: torch sees no GPU here, and times are measured")
    here = ComputeDevice.of(device, request.options)
    every, table = sites(request), read(path).get(here.key)
    known = set() if again or table is None else set(table.convolutions)
    copy = table.copy if table is not None else copy_rate(device)
    if began is not None:
        began(path, len(every), sum(site.problem in known for site in every))
    start = time.perf_counter()
    for site in every:
        if site.problem in known:
            yield Tuned(site, None)
            continue
        if time.perf_counter() - start > seconds:
            return
        trial = try_forms(site.problem, site.forms, site.why_not, device, configs=configs)
        merge(path, DeviceTable.of(here, copy, {site.problem: trial.forms}))
        yield Tuned(site, trial)
