"""What no test may leave to the next."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

TRACKING = "MLFLOW_TRACKING_URI"


@pytest.fixture(autouse=True)
def _own_tracking_address() -> Iterator[None]:
    """`mlflow.set_tracking_uri` writes the environment too, which runs take their default address from."""
    before = os.environ.get(TRACKING)
    yield
    if before is None:
        os.environ.pop(TRACKING, None)
    else:
        os.environ[TRACKING] = before
