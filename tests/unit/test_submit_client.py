"""Ray's Jobs API as we call it: against answers of a small server, with Ray's own client in between."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.web_server import answering
from treelora_platform.submit import client as module
from treelora_platform.submit import preflight
from treelora_platform.submit.address import ClusterError, LostContactError
from treelora_platform.submit.client import Jobs, TakenError, UnknownJobError
from treelora_platform.submit.preflight import PROBE, connect, entrypoint, ray_check, run_probe
from treelora_platform.submit.records import Job

VERSION = {"/api/version": (200, {"ray_version": "2.60.0", "version": "4"})}
NONE: dict[str, tuple[int, Any]] = VERSION | {"/api/jobs/": (200, [])}


def details(job_id: str, status: str, **more: Any) -> dict[str, Any]:
    return {"type": "SUBMISSION", "submission_id": job_id, "status": status, "entrypoint": "x"} | more


def test_jobs_are_read_the_oldest_first_and_drivers_of_others_left_out() -> None:
    listed = [
        details("b-1", "FAILED", start_time=2, end_time=5, driver_exit_code=2, message="m", metadata={"k": "v"}),
        details("a-1", "RUNNING", start_time=1),
        {"type": "DRIVER", "job_id": "01", "status": "RUNNING", "entrypoint": ""},
    ]
    with answering(VERSION | {"/api/jobs/": (200, listed), "/api/jobs/b-1": (200, listed[0])}) as url:
        jobs = Jobs(url)
        assert jobs.ray_version == "2.60.0"
        assert jobs.all() == [
            Job("a-1", "RUNNING", begun_ms=1),
            Job("b-1", "FAILED", {"k": "v"}, 2, 5, "m", 2),
        ]
        assert jobs.get("b-1") == jobs.all()[1]


def test_the_address_that_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with answering(NONE) as url:
        assert Jobs(url).all() == []
    assert os.environ["RAY_ADDRESS"] == os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"


@pytest.mark.parametrize(("status", "text"), [(401, "wants a token|401"), (403, "403")])
def test_a_token_that_is_missing_or_wrong(status: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(VERSION | {"/api/jobs/": (status, "no")}) as url:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
        with pytest.raises(ClusterError, match=rf"refuses the token from RAY_AUTH_TOKEN \({status}\)") as refused:
            Jobs(url)
        assert "hunter2" not in str(refused.value)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
        with pytest.raises(ClusterError, match=r"wants a token, and there is none here; .* RAY_AUTH_TOKEN_PATH"):
            Jobs(url)


def test_answers_of_the_server_become_one_line() -> None:
    traceback = 'Traceback (most recent call last):\n  File "x.py"\nRuntimeError: no agent'
    answers = NONE | {
        "/api/jobs/gone-1": (404, "Job gone-1 does not exist"),
        "/api/jobs/bad-1/logs": (500, traceback),
        "/api/jobs/bad-1/stop": (500, traceback),
    }
    with answering(answers) as url:
        jobs = Jobs(url)
        with pytest.raises(UnknownJobError, match=r"knows no job 'gone-1'; `treelora jobs list` shows"):
            jobs.get("gone-1")
        with pytest.raises(ClusterError, match=rf"^{url}: RuntimeError: no agent") as failed:
            jobs.logs("bad-1")
        assert "\n" not in str(failed.value)
        with pytest.raises(ClusterError, match="RuntimeError: no agent"):
            jobs.stop("bad-1")


def test_an_id_is_taken_once() -> None:
    text = "Traceback\nValueError: Job with submission_id x-1 already exists. Please use a different submission_id."
    taken = VERSION | {"/api/jobs/": (400, text)}
    with answering(NONE) as url:
        jobs = Jobs(url)
    with answering(taken) as url:
        jobs._client._address = url
        with pytest.raises(TakenError, match="there is a job 'x-1' already"):
            jobs.submit("x-1", "true", {}, {})


def test_a_server_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", (0.5, 0.5))
    with answering(NONE) as url:
        jobs = Jobs(url)
    with pytest.raises(LostContactError, match="connection refused"):
        jobs.all()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        jobs._client._address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(LostContactError, match=r"no answer within 0.5 s"):
            jobs.get("x-1")
        assert time.monotonic() - begun < 60


SUMMARY = {
    "data": {
        "summary": [
            {"cmdline": ["raylet", "--python_worker_command=/w/python x"], "raylet": {"isHeadNode": False}},
            {"cmdline": ["raylet", "--python_worker_command=/h/python x.py"], "raylet": {"isHeadNode": True}},
        ]
    }
}


@pytest.mark.parametrize(
    ("answer", "python"), [((200, SUMMARY), "/h/python"), ((404, ""), "python"), ((200, {"data": {}}), "python")]
)
def test_the_python_of_the_heads_ray(answer: tuple[int, Any], python: str) -> None:
    with answering(NONE | {"/nodes": answer}) as url:
        assert Jobs(url).head_python() == python


def test_a_command_line_is_quoted() -> None:
    assert entrypoint("/a b/python", ["compare", "x; rm -rf ~"]) == (
        "exec '/a b/python' -m treelora_platform.submit.entry compare 'x; rm -rf ~'"
    )


def test_connecting_says_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with answering(NONE | {"/api/authentication_mode": (200, {"authentication_mode": "disabled"})}) as url:
        shown: list[Any] = []
        jobs = connect(url, shown.append)
        assert [(check.name, check.state) for check in shown] == [("cluster", "ok"), ("token", "ok")]
        assert ray_check(jobs).state == "ok"
        jobs.ray_version = "2.59.1"
        check = ray_check(jobs)
        assert check.state == "failed"
        assert "2.60.0 here, 2.59.1 on the cluster; pip install ray==2.59.1 here" in check.text


class Probed:
    """Jobs whose probe ends in a given way."""

    def __init__(self, log: str, job: Job, older: list[Job]):
        self.log, self.job, self.older = log, job, older
        self.done: list[tuple[str, str]] = []

    def all(self) -> list[Job]:
        return self.older

    def submit(self, job_id: str, entrypoint: str, runtime_env: Any, metadata: dict[str, str]) -> None:
        assert metadata == {"treelora.kind": PROBE}
        self.done.append(("submit", entrypoint))

    def get(self, job_id: str) -> Job:
        return self.job

    def logs(self, job_id: str) -> str:
        return self.log

    def stop(self, job_id: str) -> bool:
        self.done.append(("stop", job_id))
        return True

    def delete(self, job_id: str) -> None:
        self.done.append(("delete", job_id))


def test_a_report_is_found_in_the_log_and_old_probes_are_deleted() -> None:
    probe = {"treelora.kind": PROBE}
    now = int(time.time() * 1000)
    older = [
        Job("old", "FAILED", probe, 1, 2),
        Job("recent", "SUCCEEDED", probe, 1, now),
        Job("live", "RUNNING", probe, 1),
        Job("tiny-1", "SUCCEEDED", {"treelora.kind": "experiment"}, 1, 2),
    ]
    jobs: Any = Probed('setting up\nTREELORA-PROBE {"nodes": []}\nbye\n', Job("p", "SUCCEEDED"), older)
    assert run_probe(jobs, {}, "python") == {"nodes": []}
    assert jobs.done == [("delete", "old"), ("submit", "exec python -m treelora_platform.submit.entry probe")]


def test_a_probe_that_came_to_nothing_says_why() -> None:
    job = Job("p", "FAILED", message="runtime_env setup failed: disk full")
    jobs: Any = Probed("a\nb\nsh: python: not found\n", job, [])
    with pytest.raises(
        ClusterError, match=r"came to nothing: it failed: runtime_env setup failed: disk full / b / sh: "
    ):
        run_probe(jobs, {}, "python")


def test_a_probe_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treelora_platform.submit.preflight.PROBE_S", 0.0)
    jobs: Any = Probed("", Job("p", "PENDING"), [])
    with pytest.raises(ClusterError, match="no report within 0 s"):
        run_probe(jobs, {}, "python")
    assert jobs.done[-1][0] == "stop"


@pytest.mark.parametrize(
    ("mode", "remote", "file_mode", "state", "text"),
    [
        ("token", False, 0o600, "ok", "accepted, from "),
        ("token", False, 0o644, "note", "others can read"),
        ("token", True, 0o600, "note", "travels in the clear"),
        ("disabled", True, 0o600, "note", "whoever reaches that address can run code there"),
    ],
)
def test_a_way_in_that_is_not_safe_is_remarked(
    mode: str, remote: bool, file_mode: int, state: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.touch(mode=file_mode)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(preflight, "authentication_mode", lambda address: mode)
    monkeypatch.setattr(preflight, "is_loopback", lambda address: not remote)
    monkeypatch.setattr(module, "Jobs", lambda address: None)
    shown: list[Any] = []
    connect("http://head:8265", shown.append)
    assert (shown[-1].name, shown[-1].state) == ("token", state)
    assert text in shown[-1].text
    assert os.environ["RAY_AUTH_MODE"] == mode
