"""A Ray that has nothing to do: one worker of Ray Train that sleeps, with all processes that come with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 120.0
_CODE = """
import sys, time
import ray.train
from ray.train.torch import TorchTrainer

def sleep(job):
    open(job["up"], "w").close()
    time.sleep(1e6)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
folder = sys.argv[1]
TorchTrainer(
    sleep,
    train_loop_config={"up": folder + "/up"},
    scaling_config=ray.train.ScalingConfig(num_workers=1),
    run_config=ray.train.RunConfig(name="idle", storage_path=folder),
).fit()
"""


@contextmanager
def idle_ray() -> Iterator[None]:
    """Ray runs on this machine, asleep.

    Raises:
        RuntimeError: its worker didn't start.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, folder],
            env=os.environ | {"RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + START_S
            while not (Path(folder) / "up").exists():
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError("Ray Train's worker didn't start")
                time.sleep(0.2)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
