"""Following a job's log to its end, through connections that drop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from treelora_platform.submit.address import ClusterError, LostContactError, reason
from treelora_platform.submit.records import Job

SILENCE_S = 60.0
"""After so long without a word the log is asked for anew: a connection may be dead and not know it."""
PATIENCE_S = 600.0
"""How long a cluster may be out of reach."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
LOG_TRIES = 3
"""For the log of a job that has ended, perhaps with the machine that had the log."""
POLL_S = 0.5


class Log(Protocol):
    """What is needed of `client.Jobs`."""

    def get(self, job_id: str) -> Job:
        """See `Jobs.get`."""

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """See `Jobs.tail`."""


class Follower:
    """Shows each character of a log once.

    Args:
        jobs: The cluster.
        job_id: Whose log.
        show: Takes the log, piece by piece.
        say: Takes remarks about the connection, a line each.
    """

    def __init__(
        self,
        jobs: Log,
        job_id: str,
        show: Callable[[str], None],
        say: Callable[[str], None],
        *,
        silence_s: float = SILENCE_S,
        patience_s: float = PATIENCE_S,
        first_pause_s: float = FIRST_PAUSE_S,
        poll_s: float = POLL_S,
    ):
        self.jobs, self.job_id, self.show, self.say = jobs, job_id, show, say
        self.silence_s, self.patience_s, self.first_pause_s = silence_s, patience_s, first_pause_s
        self.poll_s, self.shown = poll_s, 0
        self.lost_at: float | None = None

    def follow(self) -> Job:
        """Show the log until the job has ended; returns how it did.

        Raises:
            LostContactError: the cluster was out of reach for too long; the job may still run.
            UnknownJobError: the cluster doesn't know the job, perhaps since its head was restarted.
        """
        return asyncio.run(self._follow())

    async def _follow(self) -> Job:
        pause, broken = self.first_pause_s, 0
        while True:
            trouble, job = await self._trouble(), None
            try:
                job = await asyncio.to_thread(self.jobs.get, self.job_id)
            except ClusterError as error:
                trouble = trouble or error
            if trouble is None:
                self._back()
                pause, broken = self.first_pause_s, 0
                if job and job.ended:
                    return job
                await asyncio.sleep(self.poll_s)
                continue
            broken += 1
            if job and job.ended and broken > LOG_TRIES:
                self.say(f"the end of the log can't be had ({reason(trouble)})")
                return job
            if self.lost_at is None:
                self.lost_at = time.monotonic()
                self.say(f"connection lost ({reason(trouble)}); the job doesn't need it, trying again")
            if job is None and time.monotonic() - self.lost_at > self.patience_s:
                raise LostContactError(
                    f"the cluster has been out of reach for {self.patience_s:.0f} s; whether {self.job_id} still runs "
                    "isn't known"
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _back(self) -> None:
        if self.lost_at is not None:
            self.say(f"connected again after {time.monotonic() - self.lost_at:.0f} s")
        self.lost_at = None

    async def _trouble(self) -> Exception | None:
        try:
            await self._show_once()
        except _connection_errors() as error:
            return error
        return None

    async def _show_once(self) -> None:
        """Show what comes over one connection, without what was shown before."""
        skip = self.shown
        pieces = self.jobs.tail(self.job_id)
        waiting: asyncio.Future[str] | None = None
        try:
            while True:
                waiting = asyncio.ensure_future(anext(pieces))
                done, _ = await asyncio.wait([waiting], timeout=self.silence_s)
                if not done:
                    return
                piece = waiting.result()
                new = piece[skip:]
                skip = max(0, skip - len(piece))
                self.shown += len(new)
                if new:
                    self._back()
                    self.show(new)
        except StopAsyncIteration:
            return
        finally:
            if waiting and not waiting.done():
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, *_connection_errors()):
                    await waiting
            close = getattr(pieces, "aclose", None)
            if close:
                with contextlib.suppress(*_connection_errors()):
                    await close()


def _connection_errors() -> tuple[type[Exception], ...]:
    import aiohttp

    # Ray raises RuntimeError where a connection ends before the log does
    return (aiohttp.ClientError, OSError, RuntimeError, LostContactError)


def wait_until_ended(jobs: Log, job_id: str, timeout_s: float) -> Job | None:
    """How a job ended; None where it hasn't in time."""
    end = time.monotonic() + timeout_s
    while not (job := jobs.get(job_id)).ended:
        if time.monotonic() > end:
            return None
        time.sleep(POLL_S)
    return job
