"""What no test may leave to the next."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TRACKING = "MLFLOW_TRACKING_URI"
RAY = ("benchmarks_actor", "chaos", "faults", "nodes", "rerun", "run", "storage_s3", "submit", "sweep", "tree_actor")
"""Modules of `tests/orchestration` that start Ray; two at once would wait for each other."""
MEMORY = Path("/dev/shm")
ROOM = 4 * 2**30
"""Seven times what the tests have on the disk at once, in bytes."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores work side by side
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
    # a new MLflow store waits for the disk a thousand times, a commit some forty times
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2`: a module stays together, and tests that start Ray follow one another."""
    from xdist.scheduler import LoadScopeScheduling

    class RayAlone(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::")[0]
            return "ray" if module in {f"tests/orchestration/test_{name}.py" for name in RAY} else module

    return RayAlone(config, log)


@pytest.fixture(autouse=True)
def _own_tracking_address() -> Iterator[None]:
    """`mlflow.set_tracking_uri` writes the environment too, which runs take their default address from."""
    before = os.environ.get(TRACKING)
    yield
    if before is None:
        os.environ.pop(TRACKING, None)
    else:
        os.environ[TRACKING] = before


@pytest.fixture
def terminal() -> Iterator[None]:
    """SIGINT as it is at a terminal; a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
