"""One trial as a process of its own: `python -m treelora_platform.sweep.trial JOB.json`.

A process of its own is a Ray job of its own: whatever way it ends, Ray takes back every worker, actor and placement
group that it made. Trials that Tune ends from outside leaked those when they ran inside Tune's actors.

It leaves the actor that began it at once, because Ray kills the children of an actor that ends, and a trial needs some
seconds to close its run. It watches that actor instead, and interrupts itself when that is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from treelora.data.files import write_bytes_atomically

POLL_S = 1.0
CLOSE_S = 60.0
"""Time to close the run when the parent is gone; Ray may have gone with it, and hold us up."""


def files(job: Path) -> tuple[Path, Path]:
    """Where a job's process says its number, and its exit code when it has ended."""
    return job.with_suffix(".pid"), job.with_suffix(".exit")


def watch(parent: psutil.Process) -> None:
    """Interrupt this process when another ends, and end it if that doesn't help."""
    while parent.is_running():
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(CLOSE_S)
    os._exit(130)


def run(job: dict[str, object]) -> int:
    """Run the experiment; the exit code is that of `treelora run`."""
    from rich.console import Console

    from treelora.errors import TreeLoRAError
    from treelora_platform.config import parse_config
    from treelora_platform.run import RunFailedError, run_experiment
    from treelora_platform.run_lock import RunBusyError

    config, console = parse_config(job["config"]), Console(soft_wrap=True)  # type: ignore[arg-type]
    while True:
        try:
            run_experiment(config, console, parent_run_id=job["parent_run_id"], sweep=job["values"])  # type: ignore[arg-type]
        except RunBusyError:
            time.sleep(POLL_S)  # another trial drew the same values: its result is ours
        except RunFailedError as error:
            console.print(f"error: {error}", markup=False)
            return 1
        except TreeLoRAError as error:
            console.print(f"error: {error}", markup=False)
            return 2
        else:
            return 0


def main(job_file: str) -> None:
    """Leave the parent, run the trial, and write down how it ended."""
    path = Path(job_file)
    job = json.loads(path.read_text(encoding="utf-8"))
    pid_file, exit_file = files(path)
    parent = psutil.Process(job["parent"])
    if os.fork():
        os._exit(0)
    os.setsid()
    # Ray's workers block or ignore these, and so would what they start
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    write_bytes_atomically(pid_file, str(os.getpid()).encode())
    code = 1
    try:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
        code = run(job)
    except KeyboardInterrupt:
        code = 130
    finally:
        write_bytes_atomically(exit_file, str(code).encode())


if __name__ == "__main__":
    main(sys.argv[1])
