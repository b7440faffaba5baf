"""The commands' ways through what can happen, with a cluster that is made up."""

from __future__ import annotations

import io
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from tests.support.streams import tiny_config
from treelora.errors import ConfigError
from treelora_platform.submit import flow
from treelora_platform.submit.address import LostContactError
from treelora_platform.submit.cli import submit_app
from treelora_platform.submit.client import TakenError
from treelora_platform.submit.records import Job
from treelora_platform.submit.shipping import Package
from treelora_platform.submit.submission import Needs, Submission

THIS = Submission("experiment", "tiny", "a" * 64, {}, {}, ("run", "config.yaml"), Needs("/mnt/runs"))
PACKAGE = Package((), 0, 0, "d" * 64)


class Cluster:
    """Jobs that are listed one list after the other; a log; an end."""

    def __init__(self, lists: list[list[Job]] | None = None, end: Job | None = None, log: str = ""):
        self.lists, self.end, self.log = lists or [[]], end or Job("tiny-1", "SUCCEEDED"), log
        self.submitted: list[str] = []
        self.stopped: list[str] = []
        self.taken = 0
        self.interrupts = self.lost = False

    def all(self) -> list[Job]:
        return self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]

    def get(self, job_id: str) -> Job:
        if self.lost:
            raise LostContactError("no route")
        return self.end

    def submit(self, job_id: str, entrypoint: str, runtime_env: Any, metadata: dict[str, str]) -> None:
        self.submitted.append(job_id)
        if self.taken:
            self.taken -= 1
            raise TakenError("there is one")

    def stop(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    def logs(self, job_id: str) -> str:
        return self.log

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        yield self.log
        if self.interrupts:
            raise KeyboardInterrupt
        if self.lost:
            raise OSError(113, "no route to host")


def submit(cluster: Cluster) -> str:
    jobs: Any = cluster
    return flow._submit(jobs, THIS, flow.Wishes(), "", PACKAGE, {}, {}, "exec true")


def follow(cluster: Cluster, **options: bool) -> tuple[int, str]:
    jobs: Any = cluster
    console = Console(file=io.StringIO(), soft_wrap=True)
    code = flow._follow(jobs, "tiny-1", " --address X", console, **options)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_two_that_submit_at_once_get_numbers_of_their_own() -> None:
    ended = Job("tiny-1", "SUCCEEDED", {"treelora.kind": "experiment", "treelora.config_hash": "a" * 64})
    cluster = Cluster([[], [ended]])
    cluster.taken = 1
    assert submit(cluster) == "tiny-2"
    assert cluster.submitted == ["tiny-1", "tiny-2"]


def test_the_second_of_two_sees_the_first_that_runs() -> None:
    live = Job("tiny-1", "RUNNING", {"treelora.kind": "experiment", "treelora.config_hash": "a" * 64})
    cluster = Cluster([[], [live]])
    cluster.taken = 1
    with pytest.raises(ConfigError, match="'tiny' is running as tiny-1"):
        submit(cluster)


def test_a_number_that_is_never_free_is_given_up() -> None:
    cluster = Cluster()
    cluster.taken = 1000
    with pytest.raises(ConfigError, match="being submitted by somebody else"):
        submit(cluster)
    assert len(cluster.submitted) == flow.TRIES


def test_following_ends_with_the_jobs_code(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Job("tiny-1", "FAILED", begun_ms=0, ended_ms=1, driver_exit_code=2)
    code, said = follow(Cluster(end=failed, log="[bold]no markup[/]\n"))
    assert (code, said) == (2, "tiny-1 failed after 0 s, exit code 2\n")
    assert capsys.readouterr().out == "[bold]no markup[/]\n"


def test_a_job_that_never_came_to_its_command_says_why() -> None:
    failed = Job("tiny-1", "FAILED", message="runtime_env setup failed: disk full\nTraceback")
    assert follow(Cluster(end=failed)) == (
        1,
        "tiny-1 failed after 0 s: runtime_env setup failed: disk full, exit code 1\n",
    )


def test_ctrl_c_ends_the_following_alone() -> None:
    cluster = Cluster()
    cluster.interrupts = True
    code, said = follow(cluster)
    assert (code, cluster.stopped) == (130, [])
    assert said.startswith("no longer following; the job goes on. ")
    assert "treelora jobs logs tiny-1 --follow --address X; stop it: treelora jobs stop tiny-1 --address X" in said


def test_ctrl_c_stops_the_job_where_that_is_wanted() -> None:
    cluster = Cluster(end=Job("tiny-1", "STOPPED"), log="step 3\nerror: interrupted; the same command goes on\n")
    cluster.interrupts = True
    code, said = follow(cluster, stop_on_interrupt=True)
    assert (code, cluster.stopped) == (130, ["tiny-1"])
    assert said == "tiny-1 stopped after 0 s: interrupted; the same command goes on\n"


def test_a_lost_cluster_is_no_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster()
    cluster.lost = True
    monkeypatch.setattr(flow, "Follower", _impatient)
    with pytest.raises(typer.Exit) as ended:
        follow(cluster)
    assert ended.value.exit_code == 1
    error = capsys.readouterr().err
    assert "out of reach for 0 s; whether tiny-1 still runs isn't known. Follow it: treelora jobs logs tiny-1" in error


def _impatient(*arguments: Any) -> Any:
    from treelora_platform.submit.follow import Follower

    return Follower(*arguments, patience_s=0.0, first_pause_s=0.001)


def test_a_job_without_last_words() -> None:
    jobs: Any = Cluster(end=Job("tiny-1", "STOPPED"), log="step 3\n")
    console = Console(file=io.StringIO(), soft_wrap=True)
    assert flow._stop(jobs, "tiny-1", console) == 0
    assert "it ended without a word" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_job_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "wait_until_ended", lambda *_: None)
    jobs: Any = Cluster()
    with pytest.raises(typer.Exit) as ended:
        flow._stop(jobs, "tiny-1", Console(file=io.StringIO()))
    assert ended.value.exit_code == 1


def test_a_list_has_no_lines_that_are_folded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"treelora.kind": "experiment"}
    long = Job("tiny-1", "FAILED", own, 1_000, 3_662_000, "error: " + "x" * 300, 1)
    found = [long, Job("else-1", "RUNNING"), Job("probe-1", "SUCCEEDED", {"treelora.kind": "probe"})]
    monkeypatch.setattr(flow, "_connected", lambda address: Cluster([found]))
    console = Console(file=io.StringIO())
    flow.list_jobs(None, False, console)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["job", "kind", "status", "begun", "duration", "message"]
    assert row.split()[:3] == ["tiny-1", "experiment", "FAILED"]
    assert row.endswith(f"  1:01:01   exit 1, error: {'x' * 300}")
    flow.list_jobs(None, True, console)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["tiny-1", "else-1", "probe-1"]
    monkeypatch.setattr(flow, "_connected", lambda address: Cluster([found[1:]]))
    flow.list_jobs(None, False, console)
    assert console.file.getvalue() == "no jobs of treelora; --all shows those of others\n"  # type: ignore[attr-defined]


def test_durations() -> None:
    assert [flow._duration(seconds) for seconds in (0.4, 59, 60, 3599, 3661)] == [
        "0 s",
        "59 s",
        "1:00",
        "59:59",
        "1:01:01",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--fresh", "--force"], "--fresh and --force exclude each other"),
        ([], "give a CONFIG, or --compare EXPERIMENT"),
        (["--compare", "x", "--fresh"], "--fresh is for experiments and sweeps"),
        (["demo"], "output_dir 'runs' would be lost"),
        (["demo", "--output-dir", "/mnt/r"], "no cluster is named"),
        (["demo", "--output-dir", "/mnt/r", "--address", "ray://head:10001"], "probably http://head:8265"),
    ],
)
def test_what_is_refused_before_a_cluster_is_asked(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(submit_app, ["submit", *arguments])
    assert done.exit_code == 2
    [error] = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "Traceback" not in done.output


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    (tmp_path / "c.yaml").write_text(tiny_config(tmp_path / "runs").as_yaml())
    for arguments in (["submit", str(tmp_path / "c.yaml")], ["jobs", "list"], ["jobs", "stop", "x-1"]):
        done = CliRunner().invoke(submit_app, [*arguments, "--address", address])
        assert done.exit_code == 2
        assert done.output.splitlines()[-1].startswith(f"error: {address}: nothing answers there (connection refused)")
    assert not (tmp_path / "runs").exists()
