"""The numerical contract on a model (DESIGN section 9): pvae's error against float64 beside eager's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pvae.module import compiled_forwards, restore
from pvae.options import Options
from pvae.testing import Agreement, agreement
from pvae.tools.model_run import Request, Trace, attach_reports, compile_traced, dtype_name
from pvae.tools.zoo import Case, Unsupported
from pvae.tools.zoo import names as zoo_names
from pvae.tools.zoo import parts as zoo_parts


@dataclass(frozen=True)
class Trial:
    """One compile and run: either `agreement`, or `error`, the text of what was raised."""

    agreement: Agreement | None
    error: str = ""
    traces: list[Trace] = field(default_factory=list, repr=False)
    rewrites: int = 0  # how many were done, the one that raised included

    @property
    def ok(self) -> bool:
        return self.agreement is not None and self.agreement.ok

    def __str__(self) -> str:
        return self.error or str(self.agreement)

    def to_dict(self) -> dict[str, Any]:
        found = self.agreement
        if found is None:
            return {"ok": False, "error": self.error}
        figures = {"pvae_error": found.error, "eager_error": found.eager_error, "bound": found.bound}
        return {"ok": self.ok, **{k: v if math.isfinite(v) else None for k, v in figures.items()}}


class Subject:
    """A case with what it is compared with: eager's result in its dtype and in float64, each computed once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.eager = case.run()
        self.reference = self.eager if self.eager.dtype == torch.float64 else case.cast(torch.float64).run()

    def trial(self, options: Options) -> Trial:
        """Compile the model with `options`, run it and compare. Whatever is raised is a finding, not an error here."""
        traces = compile_traced(self.case, options)
        counter = compiled_forwards(self.case.model)[0].counter  # one for the whole model
        try:
            found = agreement(self.case.run(), self.eager, self.reference)
            return Trial(found, "", attach_reports(self.case, traces), counter.count)
        except Exception as error:  # that is the question that a trial asks
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            first = next(iter(str(error).strip().splitlines()), "")
            return Trial(None, f"{type(error).__name__}: {first}{notes}", traces, counter.count)
        finally:
            restore(self.case.model)


@dataclass(frozen=True)
class Checked:
    """One line of `pvae check`."""

    request: Request
    trial: Trial | None
    skipped: str = ""

    @property
    def ok(self) -> bool:
        return self.trial is None or self.trial.ok

    @property
    def size(self) -> str:
        return "x".join(map(str, self.request.size)) if self.request.size else "default"

    def to_dict(self) -> dict[str, Any]:
        r = self.request
        what = {"model": r.model, "part": r.part, "size": self.size, "dtype": dtype_name(r.dtype), "seed": r.seed}
        return what | (self.trial.to_dict() if self.trial is not None else {"ok": True, "skipped": self.skipped})


def requests(
    base: Request,
    parts: Sequence[str],
    sizes: Sequence[tuple[int, ...] | None],
    dtypes: Sequence[torch.dtype],
    seeds: Sequence[int],
) -> list[Request]:
    """Every combination for `base.model`, or for all the zoo's autoencoders if that is `all`."""
    models = zoo_names() if base.model == "all" else (base.model,)
    if zoo_parts(base.model) == ("forward",):
        parts = zoo_parts(base.model)
    table = itertools.product(models, parts, sizes, dtypes, seeds)
    return [replace(base, model=m, part=p, size=s, dtype=d, seed=n) for m, p, s, d, n in table]


def check(wanted: Sequence[Request]) -> Iterator[Checked]:
    """Check each request. What torch itself cannot run is skipped, with torch's reason."""
    for request in wanted:
        try:
            case = request.load()
        except Unsupported as error:
            yield Checked(request, None, str(error))
            continue
        yield Checked(request, Subject(case).trial(request.options))
