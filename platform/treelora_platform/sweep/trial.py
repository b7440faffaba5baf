"""One trial as a process of its own: `python -m treelora_platform.sweep.trial JOB.json`.

A process of its own is a Ray job of its own: whatever way it ends, Ray takes back every worker, actor and placement
group that it made. Trials that Tune ends from outside leaked those when they ran inside Tune's actors.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

RETRY_S = 1.0
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Be interrupted when the parent process ends, by SIGKILL too, or has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != parent:
        raise KeyboardInterrupt


def main(job_file: str) -> int:
    """Run the trial; the exit code is that of `treelora run`."""
    from rich.console import Console

    from treelora.errors import TreeLoRAError
    from treelora_platform.config import parse_config
    from treelora_platform.run import RunBusyError, RunFailedError, run_experiment

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    end_with(job["parent"])
    config, console = parse_config(job["config"], job_file), Console(soft_wrap=True)
    while True:
        try:
            run_experiment(config, console, parent_run_id=job["parent_run_id"], sweep=job["values"])
        except RunBusyError:
            time.sleep(RETRY_S)  # another trial drew the same values: its result is ours
        except RunFailedError as error:
            console.print(f"error: {error}", markup=False)
            return 1
        except TreeLoRAError as error:
            console.print(f"error: {error}", markup=False)
            return 2
        else:
            return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
