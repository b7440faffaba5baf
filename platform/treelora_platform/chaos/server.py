"""A real MLflow server that can be killed and started again, on the same port and database."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from treelora.errors import TreeLoRAError
from treelora_platform.chaos.processes import MARK

HOST = "127.0.0.1"
_START_S = 180.0
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # its job runner keeps eight more processes busy, and leaves a folder in shared memory behind at every start
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
_POLL_S = 0.2


class TrackingServer:
    """`mlflow server` over the SQLite database of a folder of runs; nobody else's, and on the loopback address only.

    Args:
        folder: Gets `mlflow.db`, `mlartifacts/` and the server's log.
        mark: Is put into its environment.
    """

    def __init__(self, folder: Path, mark: str):
        self.folder, self.mark = folder, mark
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.address = f"http://{HOST}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the server, while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def begin(self) -> None:
        """Start it without waiting."""
        folder = self.folder.resolve()
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{(folder / 'mlflow.db').as_posix()}"),
            *("--artifacts-destination", str(folder / "mlartifacts")),
        ]
        with (folder / "mlflow-server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | {**_ENVIRONMENT, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers.

        Raises:
            TreeLoRAError: it ended, or doesn't answer in time.
        """
        end = time.monotonic() + _START_S
        while not self.answers():
            if self.pid is None or time.monotonic() > end:
                raise TreeLoRAError(f"the MLflow server didn't start; see {self.folder / 'mlflow-server.log'}")
            time.sleep(_POLL_S)

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> list[int]:
        """SIGKILL to the server and its worker; the pid, or nothing where it wasn't there."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return []
        os.killpg(process.pid, signal.SIGKILL)  # the group that `begin` made
        process.wait()
        return [process.pid]
