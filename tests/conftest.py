"""What no test may leave to the next."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

TRACKING = "MLFLOW_TRACKING_URI"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n 2 --dist loadgroup`: a module stays together, and Ray's tests follow one another."""
    for item in items:
        module = item.nodeid.split("::")[0]
        alone = module.startswith("tests/orchestration/")
        item.add_marker(pytest.mark.xdist_group("orchestration" if alone else module))


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
