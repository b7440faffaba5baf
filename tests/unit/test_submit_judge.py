"""What is made of a probe's report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_platform.submit.judge import Check, added, fits, judge, resource_check
from treelora_platform.submit.submission import Needs
from treelora_platform.submit.versions import at_odds, minor, public, requirements, satisfies

NEEDS = Needs("/mnt/runs", workers=2, cpus=1, tracking_uri="http://mlflow:5000", tracking_base="/mnt/runs")
HERE = {"torch": "2.13.0+cpu", "peft": "0.21.2"}
CONDITIONS = {"torch": ">=2.9", "peft": ">=0.21"}


def node(name: str, head: bool = False, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"id-{name}",
        "name": name,
        "head": head,
        "python": "3.11.9",
        "ray": "2.60.0",
        "packages": {"torch": "2.13.0+cpu", "peft": "0.21.2"},
        "paths": {},
        "tracking": None,
        "wrote": True,
        "missing": [],
        "resources": {"CPU": 1.0, "GPU": 0.0},
        "free": {"CPU": 1.0, "GPU": 0.0},
    } | changes


def report(*nodes: dict[str, Any], **head: Any) -> dict[str, Any]:
    facts = {"free_bytes": 5e9, "paths": {}, "tracking": "http://mlflow:5000"} | head
    return {"head": facts, "nodes": list(nodes) or [node("a", head=True), node("b")], "autoscaler": None}


def judged(found: dict[str, Any], needs: Needs = NEEDS) -> dict[str, Check]:
    """Checks by name, of those that have one line each."""
    return {check.name: check for check in judge(found, needs, HERE, CONDITIONS, "3.11.7")}


def with_needs(**changes: Any) -> Needs:
    return Needs(**(NEEDS.__dict__ | changes))


def test_a_cluster_that_has_everything() -> None:
    found = judge(report(), NEEDS, HERE, CONDITIONS, "3.11.7")
    assert [(check.name, check.state) for check in found] == [
        ("Python", "ok"),
        ("packages", "ok"),
        ("storage", "ok"),
        ("resources", "ok"),
        ("MLflow", "ok"),
    ]
    assert found[0].text == "3.11 here and on 2 nodes"
    assert found[1].text == "2 packages equal on all nodes and here: torch 2.13.0+cpu, peft 0.21.2"
    assert found[2].text == "/mnt/runs: written on each node and read on all others, 5 GB free"
    assert found[3].text == "2 workers of 1 CPU: room for 2"
    assert found[4].text == "http://mlflow:5000: answers 2 nodes"


def test_a_node_that_does_not_answer_is_named() -> None:
    found = judge(report(node("a", head=True), node("b") | {"error": "no answer within 90 s"}), NEEDS, {}, {}, "3.11.7")
    assert found[0] == Check("nodes", "failed", "b: no answer within 90 s")
    silent = {"error": "no answer", "id": "x"}
    assert judge(report(silent), NEEDS, {}, {}, "3.11.7") == [Check("nodes", "failed", "a node: no answer")]


def test_another_python() -> None:
    check = judged(report(node("a", head=True), node("b", python="3.12.1")))["Python"]
    assert check.state == "failed"
    assert check.text.startswith("3.11.7 here, but b has 3.12.1;")


def test_packages_that_are_missing_old_or_different() -> None:
    def lines(*packages: dict[str, Any]) -> list[str]:
        nodes = [node(name, packages=one) for name, one in zip("ab", packages, strict=True)]
        found = judge(report(*nodes), NEEDS, HERE, CONDITIONS, "3.11.7")
        assert {check.state for check in found if check.name == "packages"} == {"failed"}
        return [check.text for check in found if check.name == "packages"]

    good = {"torch": "2.13.0", "peft": "0.21.2"}
    assert lines(good, good | {"peft": None}) == ["b has no peft; install them there"]
    assert lines(good | {"torch": "2.8.1"}, good | {"torch": "2.8.1"}) == [
        "a has torch 2.8.1, needed is >=2.9",
        "b has torch 2.8.1, needed is >=2.9",
    ]
    [text] = lines(good, good | {"peft": "0.22.0"})
    assert text == "peft differs between nodes: 0.21.2 on a, 0.22.0 on b; install one version"


def test_builds_of_one_version_are_equal_and_other_versions_than_here_are_remarked() -> None:
    builds = [node("a", packages=HERE), node("b", packages=HERE | {"torch": "2.13.0+cu126"})]
    assert judged(report(*builds))["packages"].state == "ok"
    newer = [node(name, packages=HERE | {"peft": "0.23.0"}) for name in "ab"]
    check = judged(report(*newer))["packages"]
    assert (check.state, check.text.split(": ")[1]) == ("note", "peft 0.23.0 (here 0.21.2)")


def test_storage_that_is_not_shared() -> None:
    apart = report(
        node("a", head=True, missing=["id-b"]),
        node("b", wrote=False, why="doesn't see what the head has written there"),
    )
    check = judged(apart)["storage"]
    assert check.state == "failed"
    assert check.text.startswith(
        "/mnt/runs isn't shared: b doesn't see what the head has written there; a (head) doesn't see what b wrote;"
    )


def test_storage_that_cannot_be_written_to_or_is_full() -> None:
    check = judged(report(error="Read-only file system"))["storage"]
    assert (check.state, "on the head (Read-only file system)" in check.text) == ("failed", True)
    check = judged(report(free_bytes=4e8))["storage"]
    assert (check.state, check.text) == ("failed", "/mnt/runs has 400 MB free, 500 MB are needed")


def test_data_that_only_this_machine_sees(tmp_path: Path) -> None:
    needs = with_needs(head_paths=(str(tmp_path), "s3://b/tasks"), node_paths=("/mnt/llama",))
    nodes = [node("a", head=True, paths={"/mnt/llama": True}), node("b", paths={"/mnt/llama": False})]
    found = judge(report(*nodes, paths={str(tmp_path): False, "s3://b/tasks": True}), needs, HERE, CONDITIONS, "3.11.7")
    data = [(check.name, check.state, check.text) for check in found if check.name in ("data", "model")]
    remedy = "copy it to storage that the cluster sees"
    assert data == [
        ("data", "failed", f"{tmp_path} isn't seen by the head but by this machine; {remedy}"),
        ("data", "ok", "s3://b/tasks: visible"),
        ("model", "failed", f"/mnt/llama isn't seen by b; {remedy}"),
    ]
    denied = report(paths={str(tmp_path): True, "s3://b/tasks": "AccessDenied"})
    check = judged(denied, with_needs(head_paths=("s3://b/tasks",)))["data"]
    assert check.text == f"s3://b/tasks isn't seen by the head (AccessDenied); {remedy}"


def room(*cpus: float, free: float | None = None, autoscaler: Any = None, **needs: Any) -> Check:
    sizes = [{"CPU": count, "GPU": 0.0} for count in cpus]
    nodes = [node(f"n{i}", resources=size, free=size) for i, size in enumerate(sizes)]
    if free is not None:
        nodes = [one | {"free": {"CPU": free, "GPU": 0.0}} for one in nodes]
    return resource_check(nodes, autoscaler, with_needs(**needs))


def test_a_worker_has_to_fit_on_one_node() -> None:
    assert room(2, 2, workers=2, cpus=2).state == "ok"
    check = room(2, 2, workers=1, cpus=4)
    assert check.state == "failed"
    assert check.text.startswith("1 worker of 4 CPUs: room for 0 (n0 2 CPUs, n1 2 CPUs); lower cluster.workers")
    assert room(3, 3, workers=3, cpus=2).text.startswith("3 workers of 2 CPUs: room for 2 (")
    assert room(8, workers=1, cpus=1, gpus=0.5).text.startswith("1 worker of 1 CPU and 0.5 GPUs: room for 0")


def test_a_busy_cluster_is_waited_for() -> None:
    check = room(2, 2, free=1, workers=4, cpus=1)
    assert (check.state, check.text) == (
        "note",
        "4 workers of 1 CPU: room for 4, for 2 at the moment; the job will wait",
    )


def test_a_run_that_makes_do_with_fewer() -> None:
    assert room(1, workers=4, least_workers=1).state == "note"
    assert room(1, workers=4, least_workers=2).state == "failed"


def test_what_an_autoscaler_may_add_counts() -> None:
    grows = {"kind": "ray up", "most": 2, "types": [{"resources": {"CPU": 4.0}, "most": 2}]}
    assert room(0, workers=8, autoscaler=grows).state == "ok"
    check = room(0, workers=9, autoscaler=grows)
    assert (check.state, "with the autoscaler 8 at most" in check.text) == ("failed", True)
    assert room(0, workers=9, autoscaler={"kind": "KubeRay"}).state == "note"


def test_the_roomiest_nodes_are_added_first() -> None:
    grows = {
        "most": 3,
        "types": [{"resources": {"CPU": 1.0}, "most": 3}, {"resources": {"CPU": 8.0}, "most": 2}],
    }
    assert added(grows, with_needs(cpus=1)) == 8 + 8 + 1
    assert added(grows, with_needs(cpus=2)) == 4 + 4


@given(st.lists(st.integers(0, 8), max_size=4), st.integers(1, 4))
def test_room_is_what_can_be_dealt_out_one_by_one(cpus: list[int], share: int) -> None:
    placed, left = 0, list(cpus)
    while any(free >= share for free in left):
        left[next(i for i, free in enumerate(left) if free >= share)] -= share
        placed += 1
    assert sum(fits({"CPU": float(count)}, with_needs(cpus=share)) for count in cpus) == placed


@pytest.mark.parametrize(
    ("uri", "state"),
    [
        (None, "failed"),
        ("http://mlflow:5000", "ok"),
        ("sqlite:////mnt/runs/mlflow.db", "note"),
        ("postgresql://db/mlflow", "note"),
    ],
)
def test_where_mlflow_is(uri: str | None, state: str) -> None:
    assert judged(report(tracking=uri))["MLflow"].state == state


def test_a_file_of_mlflow_is_fine_where_one_machine_writes() -> None:
    alone = report(node("a", head=True, resources={"CPU": 2.0}, free={"CPU": 2.0}), tracking="sqlite:////mnt/mlflow.db")
    assert judged(alone)["MLflow"].state == "ok"
    apart = report(tracking="sqlite:////mnt/mlflow.db")
    assert judged(apart, with_needs(workers=0))["MLflow"].state == "ok"


def test_mlflow_that_a_node_cannot_reach() -> None:
    check = judged(report(node("a", head=True), node("b", tracking="connection refused")))["MLflow"]
    assert check.state == "failed"
    assert check.text.startswith("http://mlflow:5000 can't be used by b (connection refused);")


def test_a_comparison_needs_no_workers() -> None:
    found = judged(report(node("a", resources={"CPU": 0.0}, free={"CPU": 0.0})), with_needs(workers=0))
    assert "resources" not in found
    assert {check.state for check in found.values()} == {"ok"}


def test_the_head_is_named_first_and_the_others_in_order() -> None:
    none = {"CPU": 0.0, "GPU": 0.0}
    nodes = [node(name, head=name == "m", resources=none, free=none) for name in ("z", "a", "m")]
    assert "room for 0 (m (head) nothing, a nothing, z nothing)" in judged(report(*nodes))["resources"].text


def test_the_report_is_not_changed() -> None:
    found = report()
    before = copy.deepcopy(found)
    judged(found)
    assert found == before


def test_versions() -> None:
    assert public("2.13.0+cu126") == "2.13.0"
    assert [minor(text) for text in ("3.11.7", "3.12.0rc1", "3.11")] == ["3.11", "3.12", "3.11"]
    assert satisfies("2.13.0+cpu", ">=2.9")
    assert satisfies("2.14.0.dev1", ">=2.9")
    assert not satisfies("2.8", ">=2.9")
    assert satisfies("no version", ">=2.9")
    assert satisfies("1", "")
    assert at_odds({"a": {"x": "1+l", "y": "1"}, "b": {"x": "1", "y": "2"}, "c": {"y": None}}) == {
        "y": {"1": ["a"], "2": ["b"]}
    }


def test_what_the_project_requires_is_known() -> None:
    found = requirements()
    assert found["torch"].startswith(">=")
    assert "pytest" not in found
    assert "ray" in found
