"""The run that others are held against is made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.whole_runs import Result, config_in
from treelora_platform.run import run_experiment


@pytest.fixture(scope="module")
def console() -> Iterator[Console]:
    """A terminal that nobody sees; Ray ends with the module's last test."""
    import ray

    with open(os.devnull, "w") as nowhere:
        yield Console(file=nowhere)
    ray.shutdown()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run's folder."""
    with open(os.devnull, "w") as nowhere:
        return run_experiment(config_in(tmp_path_factory.mktemp("whole")), Console(file=nowhere)).run_dir


@pytest.fixture(scope="session")
def expected(whole: Path) -> Result:
    """What it left."""
    return Result.of(whole)
