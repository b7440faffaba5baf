"""A Ray of our own, in a process of its own: what it starts, and that it works without the rest."""

import json

from tests.architecture.test_imports import run_python

CODE = """
import json, psutil, ray
from ray._private import services
from ray._private.node import Node
from treelora_platform.cluster import connect
from treelora_platform.config import ExperimentConfig

before = dict(vars(Node)), services.get_node
connect(ExperimentConfig())

@ray.remote
def squared(number):
    return number ** 2

answers = ray.get([squared.remote(number) for number in range(4)])
lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
ray.shutdown()
import ray.dashboard.optional_deps
print(json.dumps({"answers": answers, "lines": lines, "restored": before == (dict(vars(Node)), services.get_node)}))
"""


def test_a_ray_of_our_own_has_no_dashboard_no_autoscaler_and_no_log_monitor() -> None:
    found = json.loads(run_python(CODE).splitlines()[-1])
    assert found["answers"] == [0, 1, 4, 9]
    assert found["restored"]
    for needed in ("raylet", "gcs_server", "DashboardAgent", "RuntimeEnvAgent"):
        assert any(needed in line for line in found["lines"]), needed
    for unneeded in ("dashboard/dashboard.py", "monitor.py"):
        assert not any(unneeded in line for line in found["lines"]), unneeded
