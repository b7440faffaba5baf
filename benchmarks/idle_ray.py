"""A Ray of our own that has nothing to do: one worker of Ray Train that sleeps, and all processes that come with it.

`python -m benchmarks.idle_ray` prints what each of them costs: how often it wakes, and its share of a core.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer
from treelora_platform.chaos.processes import title

START_S = 120.0
SETTLE_S, WATCH_S = 10.0, 20.0
_CODE = """
import sys, time
from pathlib import Path
from treelora_platform.cluster import connect
from treelora_platform.config import parse_config

def sleep(job):
    Path(job["up"]).touch()
    time.sleep(1e6)

folder = Path(sys.argv[1])
config = parse_config({"cluster": {"workers": 1}})
connect(config)
from treelora_platform.trainer import Trainer
Trainer(sleep, {"up": str(folder / "up")}, config, folder, "idle").fit()
"""


def main() -> None:
    """Watch one, print."""
    with idle_ray() as driver:
        time.sleep(SETTLE_S)
        processes = [driver, *driver.children(recursive=True)]
        before = [used(process) for process in processes]
        time.sleep(WATCH_S)
        rates = (np.array([used(process) for process in processes]) - before) / WATCH_S
        names = [name_of(process) for process in processes]
    table = Table(title=f"an idle Ray, over {WATCH_S:g} s", caption=footer(), caption_justify="left")
    table.add_column("process")
    table.add_column("wakes a second", justify="right")
    table.add_column("% of a core", justify="right")
    for place in np.argsort(-rates[:, 0], kind="stable"):
        table.add_row(names[place], f"{rates[place, 0]:,.0f}", f"{100 * rates[place, 1]:.1f}")
    table.add_section()
    table.add_row(f"all {len(names)}", f"{rates[:, 0].sum():,.0f}", f"{100 * rates[:, 1].sum():.1f}")
    Console(width=120).print(table)


def name_of(process: psutil.Process) -> str:
    """Its script, or its title."""
    parts = title(process).split()
    scripts = [part for part in parts if part.endswith(".py")] if Path(parts[0]).name.startswith("python") else []
    return Path([*scripts, parts[0]][0]).name


def used(process: psutil.Process) -> tuple[int, float]:
    """How often a process's threads have gone to sleep, and the seconds that they have computed."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/status")
    slept = (
        line.split()[1]
        for thread in threads
        for line in thread.read_text().splitlines()
        if line.startswith("voluntary")
    )
    return sum(map(int, slept)), sum(process.cpu_times()[:2])


@contextmanager
def idle_ray() -> Iterator[psutil.Process]:
    """Ray runs on this machine, asleep; its driver."""
    with tempfile.TemporaryDirectory() as folder:
        driver = start_idle_ray(Path(folder))
        try:
            yield driver
        finally:
            driver.terminate()
            driver.wait()


def start_idle_ray(folder: Path) -> psutil.Popen:
    """Driver of a Ray that has come to rest.

    Raises:
        RuntimeError: its worker didn't start.
    """
    folder.mkdir(exist_ok=True)
    driver = psutil.Popen(
        [sys.executable, "-c", _CODE, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + START_S
    while not (folder / "up").exists():
        if time.monotonic() > end or driver.poll() is not None:
            driver.kill()
            raise RuntimeError("Ray Train's worker didn't start")
        time.sleep(0.2)
    return driver


if __name__ == "__main__":
    main()
