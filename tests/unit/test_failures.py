"""Which failures of the workers are tried again."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest

from treelora.errors import ConfigError, DataError, LostError
from treelora_platform.attempts import causes, explain, ours


class FakeTrainingError(Exception):
    """Shaped as Ray Train's WorkerGroupError: failures by rank, each with or without a `cause`."""

    def __init__(self, *failures: BaseException | SimpleNamespace):
        super().__init__("workers failed")
        self.worker_failures = dict(enumerate(failures))


@pytest.mark.parametrize("mistake", [DataError("row 3"), ConfigError("rank 0")])
def test_a_mistake_is_ours_and_speaks_for_itself(mistake: Exception) -> None:
    error = FakeTrainingError(RuntimeError("connection closed by peer"), SimpleNamespace(cause=mistake))
    assert ours(error) is mistake
    assert explain(error) == str(mistake)


def test_what_a_restart_brings_back_is_not_a_mistake() -> None:
    error = FakeTrainingError(LostError("actor tree-x died during step 4"))
    assert ours(error) is None
    assert explain(error) == "worker 0 failed: actor tree-x died during step 4"


def test_other_failures_name_rank_and_last_line() -> None:
    error = FakeTrainingError(RuntimeError("first line\nlast line"))
    assert list(causes(error)) == [0]
    assert explain(error).splitlines()[0] == "worker 0 failed: last line"
    assert ours(error) is None


@pytest.mark.parametrize(
    "cause",
    [RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), type("OutOfMemoryError", (Exception,), {})("x")],
)
def test_out_of_memory_says_what_to_reduce(cause: Exception) -> None:
    said = explain(FakeTrainingError(cause))
    assert said.startswith("worker 0 failed: ")
    assert "raise train.accumulation or cluster.workers" in said


def test_a_full_disk_is_named_with_its_path() -> None:
    cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/runs/x/events.jsonl")
    said = explain(FakeTrainingError(cause))
    assert "'/data/runs/x/events.jsonl' (the disk is full: make room" in said


def test_what_kept_the_workers_from_starting_is_told() -> None:
    error = FakeTrainingError()
    error.controller_failure = RuntimeError("Traceback ...\nValueError: no NVIDIA driver was found")  # type: ignore[attr-defined]
    assert explain(error).splitlines()[0] == (
        "the workers could not be started: ValueError: no NVIDIA driver was found"
    )


def test_what_a_watchdog_said_comes_before_what_its_end_did_to_the_others() -> None:
    error = FakeTrainingError(RuntimeError("connection closed by peer"))
    assert (
        explain(error, ["rank 1: no progress for 5 s after a: step 3"]) == "rank 1: no progress for 5 s after a: step 3"
    )
