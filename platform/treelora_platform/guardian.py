"""Ends what is left of a local Ray when its driver was killed: a process of its own, begun by `connect`.

Ray's own processes follow a driver that ends in order. After a SIGKILL its agents were seen to linger for a minute and
more; this small process, which such a signal doesn't reach, sees to them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import psutil

POLL_S = 2.0
GRACE_S = 10.0
_RAY_ROOTS = ("raylet", "gcs_server")


def start_guardian() -> subprocess.Popen[bytes]:
    """Watch over this process until it ends; the guardian is gone a few seconds after it."""
    command = [sys.executable, "-m", "treelora_platform.guardian"]
    # a session of its own, so that Ctrl-C in a terminal reaches the driver only
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def ray_family(driver: psutil.Process) -> set[psutil.Process]:
    """Ray's processes under a driver."""
    family: set[psutil.Process] = set()
    with contextlib.suppress(psutil.Error):
        for child in driver.children():
            if child.name() in _RAY_ROOTS:
                family |= {child, *child.children(recursive=True)}
    return family


def watch(driver: psutil.Process) -> None:
    """Wait for the driver's end, give its Ray a grace, then end what is left."""
    family: set[psutil.Process] = set()
    while os.getppid() == driver.pid:
        family = {process for process in family | ray_family(driver) if process.is_running()}
        time.sleep(POLL_S)
    _, left = psutil.wait_procs(list(family), timeout=GRACE_S)
    for process in left:
        with contextlib.suppress(psutil.Error):  # psutil knows a process by pid and start: no other can be hit
            process.kill()


if __name__ == "__main__":
    with contextlib.suppress(psutil.NoSuchProcess):
        watch(psutil.Process(os.getppid()))
