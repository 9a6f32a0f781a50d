"""What stands in the key of every compiled-code cache besides the graph: pvae's own sources and the options.

Inductor's cache keys a graph by its nodes, and knows nothing of what an op of ours does inside. An edited source must never
meet code that was compiled for the old one, so a pass that does nothing carries a hash of all of pvae's sources into the
key (a plain function in that slot would bypass the cache each time; an `inner_compile` wrapper is not in the key at all).
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

import pvae.kernels
import pvae.passes
import pvae.runtime
from pvae.runtime.torch_compat import CustomGraphPass


@functools.cache
def source_hash() -> str:
    """SHA-256 over pvae's sources (all but the tools) and the versions of torch and cuDNN; Inductor keys the rest."""
    digest = hashlib.sha256(f"{torch.__version__} {torch.backends.cudnn.version()}".encode())
    for package in (pvae, pvae.kernels, pvae.passes, pvae.runtime):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class KeyPass(CustomGraphPass):
    """Does nothing to the graph, or what the pass that the user had in this slot does; keys the cache."""

    def __init__(self, text: str, inner: Any = None) -> None:
        self.text = text
        self.inner = inner

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.inner is not None:
            self.inner(graph)

    def uuid(self) -> Any:
        inner = self.inner.uuid() if isinstance(self.inner, CustomGraphPass) else None
        if self.inner is not None and inner is None:
            return None  # the user's plain function bypasses the cache, as it does without pvae
        return source_hash(), self.text, inner
