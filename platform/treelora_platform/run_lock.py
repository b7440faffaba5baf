"""One process a run: the folder's lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treelora.errors import ConfigError


class RunBusyError(ConfigError):
    """Another process is executing the run."""


def is_busy(run_dir: Path) -> bool:
    """Whether a process holds the folder's lock."""
    if not (run_dir / ".lock").exists():
        return False
    try:
        with only_one(run_dir):
            return False
    except RunBusyError:
        return True


@contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Hold a folder's lock.

    Raises:
        RunBusyError: another process holds it.
    """
    import fcntl

    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunBusyError(
                f"run {run_dir.name!r} is being executed by another process ({run_dir}); wait or rename"
            ) from None
        yield
