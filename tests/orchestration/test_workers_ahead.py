"""Workers of a Ray of our own, in a process of its own: they are there, with all imports, when they are asked for."""

import json
import sys
from pathlib import Path

import pytest

from tests.architecture.test_imports import run_python
from treelora_platform.config import load_config
from treelora_platform.workers_ahead import HOOK, start_ahead, worker_variables

CODE = """
import json, os, sys, time
from pathlib import Path
import psutil
from treelora_platform.cluster import connect
from treelora_platform.config import load_config
from treelora_platform.trainer import Trainer
from treelora_platform.workers_ahead import start_ahead

folder, workers = Path({folder!r}), 2
config = load_config("jobs/configs/demo.yaml", ["cluster.stall_seconds=300"])

def idle():
    return {{p.pid for p in psutil.Process().children(recursive=True) if "ray::IDLE" in " ".join(p.cmdline())}}

def work(job):
    import ray.train
    import torch
    found = {{
        "pid": os.getpid(),
        "engine": "treelora_platform.engine" in sys.modules,
        "worker": "treelora_platform.worker" in sys.modules,
        "threads": os.environ["OMP_NUM_THREADS"],
    }}
    (folder / f"{{ray.train.get_context().get_world_rank()}}.json").write_text(json.dumps(found))

connect(config)
start_ahead(config)
end = time.monotonic() + 60
while len(before := idle()) < workers and time.monotonic() < end:
    time.sleep(0.1)
Trainer(work, {{}}, config, folder, "ahead").fit()
found = [json.loads((folder / f"{{rank}}.json").read_text()) for rank in range(workers)]
print(json.dumps({{"before": sorted(before), "found": found}}))
"""


def test_workers_are_the_processes_that_were_started_ahead(tmp_path: Path) -> None:
    answer = json.loads(run_python(CODE.format(folder=str(tmp_path))).splitlines()[-1])
    assert sorted(found["pid"] for found in answer["found"]) == answer["before"]
    for found in answer["found"]:
        assert found["worker"]
        assert found["engine"]
        assert found["threads"] == "1"


def test_only_a_ray_of_our_own_starts_workers_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = load_config(
        "jobs/configs/demo.yaml", ["engine.kind=torch", "cluster.workers=1", "cluster.cpus_per_worker=2"]
    )
    monkeypatch.setattr("treelora_platform.workers_ahead.owns_ray", lambda: False)
    assert worker_variables(config) == {}
    monkeypatch.setattr("treelora_platform.workers_ahead.owns_ray", lambda: True)
    expected = {HOOK: "treelora_platform.workers_ahead.import_ahead", "OMP_NUM_THREADS": "2"}
    assert worker_variables(config) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's, which Ray would leave alone, too
    assert worker_variables(config)["OMP_NUM_THREADS"] == "5"
    with_gpus = load_config("jobs/configs/demo.yaml", ["cluster.gpus_per_worker=1"])
    assert worker_variables(with_gpus) == {}


def test_a_ray_with_other_parts_starts_workers_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("treelora_platform.workers_ahead.owns_ray", lambda: True)
    monkeypatch.setitem(sys.modules, "ray.core.generated.node_manager_pb2", None)
    start_ahead(load_config("jobs/configs/demo.yaml", []))
    assert "started no worker ahead" in caplog.text
    assert "node_manager_pb2" in caplog.text
