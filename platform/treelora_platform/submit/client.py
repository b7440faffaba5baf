"""Ray's Jobs API with time limits, and with errors of one line. It imports Ray: import it inside functions."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from treelora.errors import ConfigError
from treelora_platform.submit.address import VARIABLES, ClusterError, LostContactError, reason, token_source
from treelora_platform.submit.records import Job

ANSWER_S = (10.0, 60.0)
"""To connect, and between two bytes of an answer; a submission may wait 30 s for the head's agent."""
_TALKATIVE = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)
"""Ray's loggers whose lines about uploads and sockets would come between ours."""
_PYTHON_OPTION = "--python_worker_command="


class UnknownJobError(ConfigError):
    """The cluster doesn't know a job."""


class TakenError(ClusterError):
    """A job of that id is there already."""


class _Client(JobSubmissionClient):
    """Ray's client; of its own it would wait for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", ANSWER_S)
        return super()._do_request(method, endpoint, **options)

    def ask(self, endpoint: str) -> Any:
        """What the dashboard answers at one of its own addresses; None where it has none such."""
        answer = self._do_request("GET", endpoint)
        return answer.json() if answer.ok else None


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """See that the cluster lets us in.

        Raises:
            ClusterError: it doesn't, or is gone.
        """
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.address = address
        with self._plainly(), _only(address):
            self._client = _Client(address)
            self.ray_version = str((self._client.ask("/api/version") or {}).get("ray_version"))
            self._client.list_jobs()  # versions are told to everybody, jobs are not

    def all(self) -> list[Job]:
        """All that were submitted, the oldest first."""
        with self._plainly():
            found = [_job(details) for details in self._client.list_jobs() if details.type == JobType.SUBMISSION]
        return sorted(found, key=lambda job: job.begun_ms or 0)

    def get(self, job_id: str) -> Job:
        """One of them.

        Raises:
            UnknownJobError: there is none of that id.
        """
        with self._plainly(job_id):
            return _job(self._client.get_job_info(job_id))

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Upload what has to be, and start a job.

        Raises:
            TakenError: there is one of that id, perhaps since a moment ago.
        """
        with self._plainly(job_id):
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env, metadata=metadata
            )

    def stop(self, job_id: str) -> bool:
        """Send SIGTERM, and after a while SIGKILL; whether there was something to stop."""
        with self._plainly(job_id):
            return bool(self._client.stop_job(job_id))

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended."""
        with self._plainly(job_id):
            self._client.delete_job(job_id)

    def logs(self, job_id: str) -> str:
        """What a job has printed so far."""
        with self._plainly(job_id):
            return self._client.get_job_logs(job_id)

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """What a job prints, from its beginning to its end."""
        return self._client.tail_job_logs(job_id)

    def head_python(self) -> str:
        """The Python that Ray itself runs with on the head: `python` there may be another one, without Ray."""
        with self._plainly():
            answer = self._client.ask("/nodes?view=summary") or {}
        for node in answer.get("data", {}).get("summary", ()):
            if node.get("raylet", {}).get("isHeadNode"):
                commands = [part for part in node.get("cmdline", ()) if part.startswith(_PYTHON_OPTION)]
                words = commands[0].removeprefix(_PYTHON_OPTION).split() if commands else []
                if words and words[0].startswith("/"):
                    return words[0]
        return "python"

    @contextlib.contextmanager
    def _plainly(self, job_id: str = "") -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            source = token_source()
            raise ClusterError(
                f"{self.address} wants a token, and there is none here; put the cluster's into a file of mode 600 and "
                "name it in RAY_AUTH_TOKEN_PATH"
                if source is None
                else f"{self.address} refuses the token from {source} ({_code(str(error))}); it has to be the cluster's"
            ) from None
        except (requests.RequestException, ConnectionError) as error:
            slow = isinstance(error, requests.Timeout)
            why = f"no answer within {ANSWER_S[1]:g} s" if slow else reason(error)
            raise LostContactError(f"{self.address}: {why}") from None
        except (RuntimeError, ValueError) as error:
            raise _explained(str(error), job_id, self.address) from None


def _explained(text: str, job_id: str, address: str) -> ConfigError | ClusterError:
    """Ray's answer, which often is a traceback, in a line."""
    if "status code 404" in text and "does not exist" in text:
        return UnknownJobError(f"{address} knows no job {job_id!r}; `treelora jobs list` shows those that it knows")
    if "already exists" in text:
        return TakenError(f"{address}: there is a job {job_id!r} already")
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return ClusterError(f"{address}: {lines[-1][:300] if lines else 'it failed without a word'}")


def _code(text: str) -> str:
    found = re.search(r"required|failed", text)
    return {"required": "401", "failed": "403"}.get(found.group() if found else "", "refused")


@contextlib.contextmanager
def _only(address: str) -> Iterator[None]:
    """Ray lets the environment win over the address that it is given."""
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    os.environ[VARIABLES[0]] = address
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or "",
        status=str(details.status),
        metadata=dict(details.metadata or {}),
        begun_ms=details.start_time,
        ended_ms=details.end_time,
        message=details.message or "",
        driver_exit_code=details.driver_exit_code,
    )
