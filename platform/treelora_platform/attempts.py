"""Fitting the workers, and beginning again from the last commit where that may help."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treelora.errors import LostError, TreeLoRAError
from treelora_platform.checkpoint import newest_name
from treelora_platform.cluster import free_placement_groups, owns_ray
from treelora_platform.config import ExperimentConfig
from treelora_platform.placement import place
from treelora_platform.preemption import PreemptedError
from treelora_platform.watchdog import FOLDER, stalls

LESS_MEMORY = (
    "out of memory: raise train.accumulation or cluster.workers (fewer rows at once), lower model.max_length or "
    "evaluation.batch_rows, set model.gradient_checkpointing, or engine.zero_stage 3 with engine.offload_weights"
)
DISK_FULL = "the disk is full: make room and run the same command again; what was committed is intact"


def fit(
    config: ExperimentConfig,
    job: dict[str, Any],
    run_dir: Path,
    attempt: int,
    say: Callable[[str], None],
    newest: Callable[[], str] | None = None,
) -> str | None:
    """Run the workers to the end of the stream.

    A failure is tried again `cluster.max_failures` times, but not a mistake of the user's, and not one that came
    twice without a commit in between. A machine that was taken away with notice is no failure.

    Args:
        config: What to run.
        job: What `worker.run_worker` gets.
        run_dir: The run's folder.
        attempt: Number of this call for the run, from 1.
        say: Gets a line where people should know of something.
        newest: Name of the run's newest commit, where it may be on another node; default: the newest in `run_dir`.

    Returns:
        None, or why the workers failed.

    Raises:
        ConfigError: the cluster has no room for the workers.
    """
    from ray.exceptions import RayError
    from ray.train.v2.api.exceptions import TrainingFailedError

    from treelora_platform.trainer import Trainer

    failure = stands = ""
    failures = tries = 0
    while failures <= config.cluster.max_failures:
        placed = place(config, say)
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
        # a name of its own for each try: Ray would silently take an old one for a run to resume
        parts = job | {"config": placed.as_dict(), "attempt": (attempt, tries)}
        trainer = Trainer(_work, parts, placed, run_dir, f"attempt-{attempt}.{tries}")
        tries += 1
        with interruptible():
            try:
                trainer.fit()
            except (TrainingFailedError, RayError) as error:  # Ray's: of the controller itself, with all its workers
                if isinstance(error, RayError) and owns_ray():
                    free_placement_groups()
                if reason := _no_failure(error):
                    say(f"{reason}; beginning again from the last commit")
                    continue
                before, failure = failure, explain(error, stalls(run_dir))
                stood, stands = stands, newest() if newest else newest_name(run_dir)
                if ours(error) or (failures and (before, stood) == (failure, stands)):
                    break  # it would come again
                failures += 1
                if failures <= config.cluster.max_failures:
                    say(f"{failure.splitlines()[0]}; beginning again from the last commit")
            else:
                return None
    return failure


def _work(job: dict[str, Any]) -> None:
    # the driver, which hands this on, need not import what only workers need
    from treelora_platform.worker import run_worker

    run_worker(job)


def _no_failure(error: BaseException) -> str:
    """Why an attempt ended where that is nobody's fault and may happen any number of times; else empty."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import PreemptionError

    if isinstance(error, PreemptionError) or any(isinstance(c, PreemptedError) for c in causes(error).values()):
        return "a machine was taken away"
    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return "the cluster had no room for the workers"
    return ""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the workers in order and arrive as KeyboardInterrupt.

    Ray Train takes SIGINT over, aborts the workers and then exits the process with 0, as if all were well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def causes(error: BaseException) -> dict[int, BaseException]:
    """What each failed worker raised, by rank."""
    failures = getattr(error, "worker_failures", None) or {}
    return {rank: getattr(cause, "cause", None) or cause for rank, cause in sorted(failures.items())}


def ours(error: BaseException) -> TreeLoRAError | None:
    """Our own error behind a failure, if it is one that would come again after a restart."""
    mistakes = (c for c in causes(error).values() if isinstance(c, TreeLoRAError) and not isinstance(c, LostError))
    return next(mistakes, None)


def explain(error: BaseException, stalled: list[str] | None = None) -> str:
    """The innermost cause of a failure on the workers, in a line or two; our own errors speak for themselves.

    Args:
        error: What Ray Train raised.
        stalled: What watchdogs said before they ended their workers.
    """
    from ray.exceptions import RayError

    if own := ours(error):
        return str(own)
    if stalled:
        return "; ".join(stalled)
    for rank, cause in causes(error).items():
        text = str(cause).strip()
        last = text.splitlines()[-1] if text else type(cause).__name__
        if "out of memory" in text.lower() or type(cause).__name__ == "OutOfMemoryError":
            last = f"{last} ({LESS_MEMORY})"
        elif "no space left on device" in text.lower() or "disk quota exceeded" in text.lower():
            last = f"{last} ({DISK_FULL})"
        return f"worker {rank} failed: {last}" + (f"\n{text}" if "\n" in text else "")
    text = str(getattr(error, "controller_failure", None) or error).strip()
    if isinstance(error, RayError):
        return f"Ray Train's controller was lost: {text.splitlines()[0]}\n{text}"
    return f"the workers could not be started: {text.splitlines()[-1]}\n{text}" if text else "training failed"
