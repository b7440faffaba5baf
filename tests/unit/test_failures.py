"""Which failures of the workers are tried again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from treelora.errors import ConfigError, DataError, LostError
from treelora_platform.cluster import causes, explain, ours


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
