"""Following a log through connections that drop, fall silent or never come about."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Sequence

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_platform.submit.address import LostContactError
from treelora_platform.submit.client import UnknownJobError
from treelora_platform.submit.follow import Follower, wait_until_ended
from treelora_platform.submit.records import Job

LINES = [f"step {i}: loss {i / 7:.3f} ä\n" for i in range(12)]
LOG = "".join(LINES)
ENDED, RUNNING = Job("x-1", "SUCCEEDED"), Job("x-1", "RUNNING")


class SilenceError(Exception):
    """In a script: the connection stays open and says nothing more."""


class Cluster:
    """A log that each connection sends from its beginning, and breaks off as the script says.

    Args:
        script: A connection each: characters that come over it, then what it dies of (None: it ends in order).
        answers: What `get` says, one after the other; the last one for ever.
    """

    def __init__(
        self,
        script: Sequence[tuple[int, Exception | type[Exception] | None]],
        answers: Sequence[Job | Exception] = (ENDED,),
        piece: int = 10,
    ):
        self.script, self.answers, self.piece = list(script), list(answers), piece
        self.connections = 0

    def get(self, job_id: str) -> Job:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        self.connections += 1
        count, end = self.script.pop(0) if self.script else (len(LOG), None)
        for start in range(0, count, self.piece):
            yield LOG[start : min(start + self.piece, count)]
        if end is SilenceError:
            await asyncio.sleep(3600)
        if end is not None:
            raise end


def followed(cluster: Cluster, **options: float) -> tuple[str, list[str], Job]:
    shown: list[str] = []
    said: list[str] = []
    times = {"silence_s": 0.05, "patience_s": 60.0, "first_pause_s": 0.001, "poll_s": 0.001} | options
    job = Follower(cluster, "x-1", shown.append, said.append, **times).follow()
    return "".join(shown), said, job


def test_a_log_that_comes_in_one_go() -> None:
    assert followed(Cluster([(len(LOG), None)])) == (LOG, [], ENDED)


cut = st.tuples(
    st.integers(0, len(LOG)),
    st.sampled_from(
        [RuntimeError("closed"), aiohttp.ClientError("reset"), ConnectionResetError(104, "reset"), SilenceError]
    ),
)


@settings(deadline=None)
@given(st.lists(cut, max_size=6), st.integers(1, 60))
def test_wherever_connections_break_each_character_is_shown_once(
    cuts: list[tuple[int, Exception | type[Exception]]], piece: int
) -> None:
    cluster = Cluster(cuts, [*[RUNNING] * len(cuts), ENDED], piece)
    text, _, job = followed(cluster, silence_s=0.005)
    assert text == LOG
    assert job == ENDED
    assert cluster.connections == len(cuts) + 1


def test_a_drop_is_said_once_and_so_is_the_return() -> None:
    cluster = Cluster(
        [(50, ConnectionResetError(104, "Connection reset by peer")), (0, OSError(111, "x"))], [RUNNING, ENDED]
    )
    text, said, _ = followed(cluster)
    assert text == LOG
    assert said == [
        "connection lost (connection reset by peer); the job doesn't need it, trying again",
        "connected again after 0 s",
    ]


def test_an_end_of_the_log_before_the_end_of_the_job_is_no_end() -> None:
    cluster = Cluster([(30, None)], [RUNNING, ENDED])
    assert followed(cluster) == (LOG, [], ENDED)
    assert cluster.connections == 2


def test_a_cluster_that_stays_away_is_given_up() -> None:
    gone = LostContactError("http://head: no route")
    cluster = Cluster([(5, OSError(113, "no route to host"))] * 1000, [gone])
    with pytest.raises(LostContactError, match="out of reach for 0 s; whether x-1 still runs isn't known"):
        followed(cluster, patience_s=0.2)
    assert cluster.connections > 2


def test_a_cluster_that_has_forgotten_the_job() -> None:
    cluster = Cluster([(5, aiohttp.ClientError("404"))] * 9, [UnknownJobError("knows no job 'x-1'")])
    with pytest.raises(UnknownJobError):
        followed(cluster)


def test_a_log_that_is_lost_with_its_machine_doesnt_hide_the_end() -> None:
    failed = Job("x-1", "FAILED", driver_exit_code=1)
    text, said, job = followed(Cluster([(7, aiohttp.ClientError("no agent"))] * 9, [failed]))
    assert (text, job) == (LOG[:7], failed)
    assert said[-1] == "the end of the log can't be had (no agent)"


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_ends_the_following_at_once() -> None:
    cluster = Cluster([(20, SilenceError)], [RUNNING])
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        followed(cluster, silence_s=3600.0)
    timer.join()


def test_waiting_for_an_end() -> None:
    assert wait_until_ended(Cluster([], [RUNNING, ENDED]), "x-1", 60.0) == ENDED
    assert wait_until_ended(Cluster([], [RUNNING]), "x-1", 0.0) is None
