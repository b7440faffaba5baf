"""How a study's runs are carried out: one after the other in this process, or in several lanes beside each other.

A lane is a process that takes one run after the other, so that Python and its libraries start once. Its runs stay in
it (`cluster.workers: 0`), each on as many threads as its configuration says: two runs on one thread each get more done
than one on two, which waits for itself at every operator.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from queue import SimpleQueue

import psutil
from rich.console import Console

from treelora.errors import ConfigError
from treelora_platform.config import ExperimentConfig
from treelora_platform.studies.spec import Job
from treelora_platform.sweep.trial import watch

Run = Callable[[ExperimentConfig, Console], object]
Attempt = tuple[str, float]
"""Why a run failed (empty: it didn't), and the seconds it took."""


def run_in_turn(jobs: Sequence[Job], run: Run, console: Console, lanes: int = 1) -> Iterator[tuple[Job, Attempt]]:
    """One job after the other, with the progress of each."""
    for job in jobs:
        console.print(job.label, markup=False, highlight=False)
        yield job, _attempt(run, job.config, console)


def run_in_lanes(jobs: Sequence[Job], run: Run, console: Console, lanes: int) -> Iterator[tuple[Job, Attempt]]:
    """Jobs in several processes, in the order in which they end.

    Where this is interrupted, the runs under way are too: they commit and stop.

    Raises:
        ConfigError: a job would start a Ray of its own.
    """
    if started := next((job for job in jobs if job.config.cluster.workers), None):
        raise ConfigError(
            f"--lanes {lanes}: {started.label} asks for {started.config.cluster.workers} Ray workers; give it "
            "cluster.workers=0 and engine.kind=torch, or one lane"
        )
    free: SimpleQueue[Lane] = SimpleQueue()
    made = [Lane() for _ in range(min(lanes, len(jobs)))]
    for lane in made:
        free.put(lane)

    def on_a_lane(config: ExperimentConfig) -> Attempt:
        lane = free.get()
        try:
            return lane.attempt(run, config)
        finally:
            free.put(lane)

    with ThreadPoolExecutor(max(1, len(made))) as threads:
        waiting = {threads.submit(on_a_lane, job.config): job for job in jobs}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for lane in made:
                lane.close()


class Lane:
    """One process for one run at a time; where it was killed, the next run gets a new one."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._busy = False

    def attempt(self, run: Run, config: ExperimentConfig) -> Attempt:
        """Carry out a run, and wait for it."""
        begin = time.monotonic()
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), _begin_lane, (os.getpid(),))
        self._busy = True
        try:
            return self._pool.submit(_quietly, run, config).result()
        except BrokenProcessPool:
            self._pool = None
            return "the process of its lane was killed", time.monotonic() - begin
        except KeyboardInterrupt:  # the run's own: it was told to stop
            return "interrupted", time.monotonic() - begin
        finally:
            self._busy = False

    def close(self) -> None:
        """Interrupt what is under way, and wait until it has stopped."""
        pool = self._pool
        if not pool:
            return
        for pid in list(pool._processes or {}) if self._busy else ():
            os.kill(pid, signal.SIGINT)
        pool.shutdown(wait=True, cancel_futures=True)


_parent = 0


def _begin_lane(parent: int) -> None:
    global _parent
    _parent = parent
    os.setsid()  # or Ctrl-C would come twice, from the terminal and from `Lane.close`
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and hand that on
    threading.Thread(target=watch, args=(psutil.Process(parent),), daemon=True).start()


def _quietly(run: Run, config: ExperimentConfig) -> Attempt:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            return _attempt(run, config, Console(file=nowhere))
        except KeyboardInterrupt:
            if os.getppid() != _parent:  # nobody is there to end this lane
                os._exit(130)
            raise


def _attempt(run: Run, config: ExperimentConfig, console: Console) -> Attempt:
    begin = time.monotonic()
    try:
        run(config, console)
    # one broken run, for whatever reason, must not cost the night; the log and the exit code tell of it
    except Exception as error:  # noqa: BLE001
        return str(error) or type(error).__name__, time.monotonic() - begin
    return "", time.monotonic() - begin
