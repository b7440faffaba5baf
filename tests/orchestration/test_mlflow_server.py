"""`jobs/mlflow-server.sh`, which a cluster's head starts: really started, on the loopback address."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "mlflow-server.sh"
ADDRESS = "127.0.0.1"


def run(folder, port):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(SCRIPT), ADDRESS, str(folder), str(port)]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=200)


def status(port, host):
    url = f"http://{ADDRESS}:{port}/api/2.0/mlflow/experiments/search?max_results=1"
    request = urllib.request.Request(url, headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def servers(folder):
    """Processes whose command names the folder: the server and what it starts, by the session that it made."""
    listed = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = {}
    for entry in listed:
        try:
            if f"{folder}/mlflow.db".encode() in (entry / "cmdline").read_bytes():
                found[int(entry.name)] = os.getsid(int(entry.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("the heads of clusters are Linux")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port = probe.getsockname()[1]
    first = run(folder, port)
    yield folder, port, first
    for session in set(servers(folder).values()):
        os.killpg(session, signal.SIGKILL)


def test_it_answers_when_the_script_returns(started):
    folder, port, first = started
    assert (first.returncode, first.stderr) == (0, "")
    assert status(port, f"{ADDRESS}:{port}") == 200
    assert (folder / "mlflow.db").exists()


def test_names_that_it_was_not_given_are_refused(started):
    _, port, _ = started
    assert status(port, f"localhost:{port}") == 200
    assert status(port, "evil.example.com") == 403


def test_a_second_start_starts_nothing(started):
    folder, port, _ = started
    before = servers(folder)
    assert before
    assert run(folder, port).returncode == 0
    assert servers(folder) == before


def test_its_process_belongs_to_no_terminal_and_refuses_pickles(started):
    folder, _, _ = started
    for pid, session in servers(folder).items():
        assert session != os.getsid(0)
        assert b"MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_a_server_that_cannot_start_is_said(tmp_path):
    broken = run(tmp_path, "no-port")
    assert broken.returncode == 1
    assert broken.stderr == f"MLflow does not answer at http://{ADDRESS}:no-port; {tmp_path}/server.log says why\n"
    assert "'no-port' is not a valid integer" in (tmp_path / "server.log").read_text()
