"""Property tests of Triton kernels under its interpreter, each file in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and other tests have imported it without. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/norms_interpreted.py
    PVAE_TEST_PROFILE=deep TRITON_INTERPRET=1 python -m pytest tests/kernels/norms_interpreted.py     (deeper)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

DEPTH = {"ci": 1, "deep": 30}[os.environ.get("PVAE_TEST_PROFILE", "ci")]


def run_interpreted(name: str) -> None:
    """Run the tests of a file beside this one under the interpreter; AssertionError with what pytest printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).with_name(name)), "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def depth(examples: int) -> settings:
    """So many examples of a property, or thirty times as many in the deep profile."""
    return settings(
        max_examples=examples * DEPTH, deadline=None, suppress_health_check=list(HealthCheck), derandomize=DEPTH == 1
    )
