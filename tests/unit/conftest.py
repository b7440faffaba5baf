"""Fixtures of several modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from treelora_platform.studies.run import Log


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """A study's log."""
    return Log(tmp_path / "log.jsonl")


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    """What it is shown stands in `console.txt`."""
    with open(tmp_path / "console.txt", "w") as file:
        yield Console(file=file, width=200)
