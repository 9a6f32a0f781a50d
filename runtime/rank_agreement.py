"""Ranks compare what they are about to run, so that a mismatch or a missing rank is an error that names it, not a hang.

The channel is the process group's store (keys and values over TCP), not a collective: a collective cannot say who is
missing. What is covered by what:

- a rank that never calls, calls something else, or died before the call: `RankAgreement.agree`, by its own timeout;
- a rank that raises inside the call (a failed compile or out of memory, say): `RankAgreement.guarded` tells the others.
  They hear of it at once where they wait in `agree`, else when their collective ends in an error;
- a rank that dies or hangs inside the call: the collective ends in an error, by the closed connection or by the timeout
  of the dedicated group (`new_group(timeout=...)`), and `guarded` adds who left no word. That is so for gloo. With NCCL
  the collective returns to Python before it has run; its watchdog ends the *process* once the group's timeout is over,
  and no Python code is left to explain anything. `TORCH_NCCL_BLOCKING_WAIT=1` turns this into an exception for `guarded`;
- a store that is gone, because the process that hosts it died (rank 0, under torchrun the agent): any of the methods.

Protocol of one call, number n (the store counts every rank's calls): each rank writes its statement; whoever arrives
last writes the verdict "all are here"; whoever gives up waiting, or fails, writes that instead. The first verdict stands
(`compare_set`) and all ranks go by it, so that no rank goes ahead into a collective that another has left. A failure is
the failing rank's statement for its next call, so after an error that all ranks saw, they are in step again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from pvae.runtime.torch_compat import default_store

GRACE = 0.8  # seconds that a failing rank gives the others, once to leave word and once to read it
LISTED = 4  # differences that an error spells out
# gloo raises plain RuntimeErrors. The second text is what its pairs say after the first timeout.
_COLLECTIVE = re.compile(r"\bgloo\b|pair closure|\bNCCL\b|\bnccl[A-Z]")


class RankError(RuntimeError):
    """The ranks did not do the same thing. `ranks`: the global ranks at fault; empty where none can be told."""

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass
class RankAgreement:
    """One rank's end of the channel of a group; make it with `of`, keep it as long as the group.

    `store` is None where there is nobody to agree with; every method is then free. `ranks` are the group's members and
    `rank` this one, as global ranks; `seconds` is how long `agree` waits. Not for several threads of one rank at a time.
    """

    store: dist.Store | None
    rank: int
    ranks: Sequence[int]
    seconds: float
    _stale: list[str] = field(default_factory=list)  # keys that this rank deletes once all have come to a later call

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, seconds: float) -> RankAgreement:
        """The channel of `group` (None: the default group). All members have to make it, in no particular order."""
        rank, ranks = dist.get_rank(), dist.get_process_group_ranks(group)
        if rank not in ranks:
            raise ValueError(f"rank {rank} is not in the group of ranks {list(ranks)}")
        if len(ranks) == 1 or dist.get_backend(group) == "fake":  # of a fake group's ranks only this one exists
            return cls(None, rank, ranks, seconds)
        name = (group or dist.group.WORLD).group_name
        return cls(dist.PrefixStore(f"pvae/agreement/{name}", default_store()), rank, ranks, seconds)

    def agree(
        self, model: str, collectives: tuple[str, ...], inputs: Sequence[Any], *, check_values: bool = False
    ) -> None:
        """Return once every rank of the group has called this with the same arguments; else raise RankError on all.

        `collectives` is the graph's sequence of collectives as text, `inputs` are the replicated ones: of tensors the
        shapes and dtypes are compared, with `check_values` also a hash of their bytes (so -0.0 is not 0.0), of all else
        the `repr`. Raises within `seconds` of this rank's call, plus twice GRACE.
        """
        if self.store is None:
            return
        with _hosted():
            call = self._state({"facts": facts_of(model, collectives, inputs, check_values)})
            if self.store.add(f"{call}/arrived", 1) == len(self.ranks):
                verdict = self._settle(call, {})
            elif self._wait([f"{call}/verdict"], self.seconds):
                verdict = json.loads(self.store.get(f"{call}/verdict"))
            else:
                missing = self._absent(call)
                verdict = self._settle(call, {"missing": missing, "seconds": self.seconds} if missing else {})
            if "missing" in verdict or "failed" in verdict:
                raise self._blame(call, verdict, model)
            texts = self._read([f"{call}/{r}" for r in self.ranks])
            if len(set(texts)) > 1:
                statements = dict(zip(self.ranks, (json.loads(t)["facts"] for t in texts), strict=True))
                raise self._mismatch(call, statements, collectives, model)
            self._forget(call)

    @contextlib.contextmanager
    def guarded(self, model: str) -> Iterator[None]:
        """Around compile and call: an exception in here is told to the other ranks, a collective's is explained."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            found = self.explain(error, model)
            if found is None:
                raise
            raise found from error

    def explain(self, error: BaseException, model: str) -> RankError | None:
        """Tell the other ranks of `error`; if a collective raised it, say which ranks failed or left no word.

        None if the error is this rank's own (or there are no others). Waits at most twice GRACE.
        """
        if self.store is None:
            return None
        collective = isinstance(error, dist.DistError) or _COLLECTIVE.search(str(error)) is not None
        failure = {"failed": f"{type(error).__name__}: {error}"[:500], "collective": collective}
        try:
            with _hosted():
                call = self._state(failure)
                verdict = self._settle(call, failure)
                return self._blame(call, verdict, model) if collective else None
        except RankError as gone:
            if collective:
                return gone
            error.add_note(f"The other ranks could not be told: {gone}")
            return None

    def _state(self, statement: Mapping[str, Any]) -> int:
        """Write this rank's statement for its next call and return the call's number."""
        assert self.store is not None
        call = self.store.add(f"calls/{self.rank}", 1)
        self._set(f"{call}/{self.rank}", json.dumps(statement))
        if self.rank == self.ranks[0]:
            self._stale += [f"{call}/arrived", f"{call}/verdict"]
        return call

    def _set(self, key: str, value: str) -> None:
        assert self.store is not None
        self.store.set(key, value)
        self._stale.append(key)

    def _settle(self, call: int, verdict: Mapping[str, Any]) -> dict[str, Any]:
        """The verdict of the call: this one, unless there is one already."""
        assert self.store is not None
        return json.loads(self.store.compare_set(f"{call}/verdict", "", json.dumps({"by": self.rank, **verdict})))

    def _wait(self, keys: list[str], seconds: float) -> bool:
        assert self.store is not None
        try:
            self.store.wait(keys, timedelta(seconds=seconds))
        except dist.DistNetworkError:
            raise
        except RuntimeError as error:  # DistStoreError of TCPStore and HashStore, a plain one of FileStore
            if "timeout" not in str(error).lower():
                raise
            return False
        return True

    def _read(self, keys: list[str]) -> list[str]:
        assert self.store is not None
        many = self.store.multi_get(keys) if self.store.has_extended_api() else [self.store.get(k) for k in keys]
        return [value.decode() for value in many]

    def _absent(self, call: int) -> list[int]:
        assert self.store is not None
        return [r for r in self.ranks if not self.store.check([f"{call}/{r}"])]

    def _forget(self, call: int) -> None:
        """Delete the keys of earlier calls: all ranks have come to this one, so none will read them again."""
        assert self.store is not None
        old = [key for key in self._stale if not key.startswith(f"{call}/")]
        self._stale = [key for key in self._stale if key.startswith(f"{call}/")]
        for key in old:
            self.store.delete_key(key)

    def _depart(self, call: int, without: Sequence[int]) -> None:
        """Stay until the others have read why: this process may host the store, and may end after the error."""
        with contextlib.suppress(dist.DistNetworkError):  # then the host has read and left
            self._set(f"{call}/read/{self.rank}", "")
            self._wait([f"{call}/read/{r}" for r in self.ranks if r not in without], GRACE)

    def _blame(self, call: int, verdict: Mapping[str, Any], model: str) -> RankError:
        by = verdict["by"]
        if "missing" in verdict:
            ranks = verdict["missing"]
            message = f"{_names(ranks)} did not call within {verdict['seconds']:g} s; rank {by} gave up waiting"
        elif not verdict["collective"]:
            ranks, message = [by], f"rank {by} failed: {verdict['failed']}"
        else:
            ranks, message = self._culprits(call)
            message += f". A collective on rank {by} ended with {verdict['failed']}"
        self._depart(call, ranks)
        return RankError(f"{model}: {message}", ranks)

    def _culprits(self, call: int) -> tuple[list[int], str]:
        """After a collective failed: those that failed by themselves, and those that leave no word."""
        self._wait([f"{call}/{r}" for r in self.ranks], GRACE)
        silent = self._absent(call)
        present = [r for r in self.ranks if r not in silent]
        stated = dict(zip(present, map(json.loads, self._read([f"{call}/{r}" for r in present])), strict=True))
        failed = {r: s["failed"] for r, s in stated.items() if "failed" in s and not s["collective"]}
        words = [f"rank {r} failed: {text}" for r, text in failed.items()]
        if silent:
            words.append(f"{_names(silent)} left no word: died, or not in this call, or stuck in it")
        return [*failed, *silent], "; ".join(words) or "no rank died or failed by itself"

    def _mismatch(
        self, call: int, statements: dict[int, dict[str, str]], collectives: Sequence[str], model: str
    ) -> RankError:
        names = list(dict.fromkeys(name for facts in statements.values() for name in facts))
        told = {name: [facts.get(name, "none") for facts in statements.values()] for name in names}
        differ = {name: texts for name, texts in told.items() if len(set(texts)) > 1}
        # Ties go to the lower ranks: Counter keeps the order of first sight.
        usual = {name: Counter(texts).most_common(1)[0][0] for name, texts in differ.items()}
        odd = [r for i, r in enumerate(self.ranks) if any(texts[i] != usual[name] for name, texts in differ.items())]
        if "graph" in differ:  # statements hold a digest; only now the sequences themselves travel
            self._set(f"{call}/graph/{self.rank}", json.dumps(collectives))
            keys = [f"{call}/graph/{r}" for r in self.ranks]
            if self._wait(keys, GRACE):
                steps = list(zip_longest(*map(json.loads, self._read(keys)), fillvalue="none"))
                first = next(i for i, step in enumerate(steps) if len(set(step)) > 1)
                differ["graph"] = list(steps[first])
                differ = {f"graph (collective {first})" if n == "graph" else n: t for n, t in differ.items()}
        lines = [f"{name}: {self._by_text(texts)}" for name, texts in list(differ.items())[:LISTED]]
        more = [f"and {len(differ) - LISTED} more"] if len(differ) > LISTED else []
        self._depart(call, [])
        return RankError(f"{model}: the ranks differ ({_names(odd)}) in\n  " + "\n  ".join(lines + more), odd)

    def _by_text(self, texts: Sequence[str]) -> str:
        return ", ".join(
            f"{_names([r for r, t in zip(self.ranks, texts, strict=True) if t == text])} {text}"
            for text in dict.fromkeys(texts)
        )


def facts_of(model: str, collectives: tuple[str, ...], inputs: Sequence[Any], check_values: bool) -> dict[str, str]:
    """What a rank is about to do, as texts that have to be the same on every rank."""
    facts = {"model": model, "graph": _digest(collectives), "number of inputs": str(len(inputs))}
    for i, value in enumerate(inputs):
        if isinstance(value, torch.Tensor):
            facts[f"shape of input {i}"] = "[" + ",".join(map(str, value.shape)) + "]"
            facts[f"dtype of input {i}"] = str(value.dtype).removeprefix("torch.")
            if check_values:
                facts[f"values of input {i}"] = "hash " + _hash(value)
        else:
            facts[f"input {i}"] = repr(value)
    return facts


@functools.lru_cache(maxsize=256)
def _digest(collectives: tuple[str, ...]) -> str:
    return hashlib.blake2b(json.dumps(collectives).encode(), digest_size=16).hexdigest()


def _hash(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy(), digest_size=6).hexdigest()


def _names(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


@contextlib.contextmanager
def _hosted() -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        raise RankError(
            f"the store of the ranks is gone: rank 0, or torchrun's agent, has died ({error})", [0]
        ) from error
