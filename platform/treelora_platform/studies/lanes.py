"""How a study's runs are carried out: one after the other in this process, or in several lanes beside each other.

A lane is a process that takes one run after the other, so that Python and its libraries start once. Its runs stay in
it (`cluster.workers: 0`), each on as many threads as its configuration says: two runs on one thread each get more done
than one on two, which waits for itself at every operator.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

from rich.console import Console

from treelora.errors import ConfigError
from treelora_platform.config import ExperimentConfig
from treelora_platform.studies.spec import Job

Run = Callable[[ExperimentConfig, Console], object]
Outcome = tuple[Job, str, float]
"""A job, why it failed (empty: it didn't), and the seconds it took."""


def run_in_turn(jobs: Sequence[Job], run: Run, console: Console, lanes: int = 1) -> Iterator[Outcome]:
    """One job after the other, with the progress of each."""
    for job in jobs:
        console.print(f"{job.label}  [dim]{job.config.name}[/]", highlight=False)
        yield job, *_attempt(run, job.config, console)


def run_in_lanes(jobs: Sequence[Job], run: Run, console: Console, lanes: int) -> Iterator[Outcome]:
    """Jobs in several processes, in the order in which they end.

    Ctrl-C reaches the lanes too: their runs commit and stop.

    Raises:
        ConfigError: a job would start a Ray of its own.
    """
    if started := next((job for job in jobs if job.config.cluster.workers), None):
        raise ConfigError(
            f"--lanes {lanes}: {started.label} asks for {started.config.cluster.workers} Ray workers; give it "
            "cluster.workers=0 and engine.kind=torch, or one lane"
        )
    with ProcessPoolExecutor(lanes, mp_context=get_context("spawn")) as pool:
        try:
            waiting = {pool.submit(_quietly, run, job.config): job for job in jobs}
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), *_result(future)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _result(future: Future[tuple[str, float]]) -> tuple[str, float]:
    try:
        return future.result()
    # a lane that was killed; its run goes on at the next call
    except Exception as error:  # noqa: BLE001
        return str(error) or type(error).__name__, 0.0


def _quietly(run: Run, config: ExperimentConfig) -> tuple[str, float]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        return _attempt(run, config, Console(file=nowhere))


def _attempt(run: Run, config: ExperimentConfig, console: Console) -> tuple[str, float]:
    begin = time.monotonic()
    try:
        run(config, console)
    # one broken run, for whatever reason, must not cost the night; the log and the exit code tell of it
    except Exception as error:  # noqa: BLE001
        return str(error) or type(error).__name__, time.monotonic() - begin
    return "", time.monotonic() - begin
