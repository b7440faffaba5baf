"""The preflight: from this machine as far as that goes, then a probe on the cluster; a line for each thing."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from treelora_platform.submit.address import (
    ClusterError,
    authentication_mode,
    is_loopback,
    readable_by_others,
    token_file,
    token_source,
)
from treelora_platform.submit.follow import wait_until_ended
from treelora_platform.submit.judge import Check, judge
from treelora_platform.submit.probe import MARK
from treelora_platform.submit.shipping import Package
from treelora_platform.submit.submission import Needs
from treelora_platform.submit.versions import here, requirements

if TYPE_CHECKING:
    from treelora_platform.submit.client import Jobs

PROBE_S = 300.0
SETTLED_S = 60.0
PROBE = "probe"
ENTRY = "treelora_platform.submit.entry"
Show = Callable[[Check], None]


class ProbeError(ClusterError):
    """The probe didn't come to a report."""


def connect(address: str, show: Show) -> Jobs:
    """Reach the cluster, with its token where it wants one.

    Raises:
        ClusterError: nothing answers, or it doesn't let us in.
    """
    mode = authentication_mode(address)
    if mode == "token":
        os.environ["RAY_AUTH_MODE"] = mode  # Ray reads it when it is imported
    from treelora_platform.submit.client import Jobs

    jobs = Jobs(address)
    show(Check("cluster", "ok", f"{address} answers"))
    remote = not is_loopback(address)
    if mode == "disabled":
        danger = "; whoever reaches that address can run code there: set RAY_AUTH_MODE=token on its nodes"
        show(Check("token", "note" if remote else "ok", "the cluster wants none" + (danger if remote else "")))
    elif remote and address.startswith("http://"):
        show(Check("token", "note", "accepted, but it travels in the clear: use an SSH tunnel or https"))
    elif token_source() == str(token_file()) and readable_by_others(token_file()):
        show(Check("token", "note", f"accepted, but others can read {token_file()}: chmod 600 it"))
    else:
        show(Check("token", "ok", f"accepted, from {token_source()}"))
    return jobs


def ray_check(jobs: Jobs) -> Check:
    """The same version of Ray on both sides."""
    import ray

    if jobs.ray_version != ray.__version__:
        return Check(
            "Ray",
            "failed",
            f"{ray.__version__} here, {jobs.ray_version} on the cluster; pip install ray=={jobs.ray_version} here, or "
            "start the cluster with the other",
        )
    return Check("Ray", "ok", f"{ray.__version__} here and there")


def package_check(package: Package) -> Check:
    """What is sent; `shipping.stage_package` has refused what is too large."""
    return Check("package", "ok", f"{package.bytes / 1e6:.1f} MB in {package.files} files, {package.digest[:12]}")


def cluster_checks(jobs: Jobs, env: dict[str, Any], needs: Needs, python: str) -> list[Check]:
    """Look around on the cluster with a job of its own."""
    try:
        report = run_probe(jobs, env, python)
    except ProbeError as error:
        return [Check("probe", "failed", str(error))]
    conditions = requirements()
    return judge(report, needs, here(list(needs.packages)), conditions, platform.python_version())


def run_probe(jobs: Jobs, env: dict[str, Any], python: str) -> dict[str, Any]:
    """The probe's report.

    Raises:
        ProbeError: it didn't come to one; with its last words.
    """
    _forget_probes(jobs)
    job_id = f"treelora-probe-{secrets.token_hex(6)}"
    jobs.submit(job_id, entrypoint(python, [PROBE]), env, {"treelora.kind": PROBE})
    with _ended(jobs, job_id):
        job = wait_until_ended(jobs, job_id, PROBE_S)
        log = jobs.logs(job_id)
        for line in reversed(log.splitlines()):
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        what = f"no report within {PROBE_S:.0f} s" if job is None else f"it {job.status.lower()}: {job.said()}"
        raise ProbeError(f"the job that looks around came to nothing: {' / '.join([what, *lines[-2:]])}")


@contextmanager
def _ended(jobs: Jobs, job_id: str) -> Iterator[None]:
    """Stop a job whatever happens, Ctrl-C too."""
    try:
        yield
    finally:
        if not jobs.get(job_id).ended:
            jobs.stop(job_id)


def _forget_probes(jobs: Jobs) -> None:
    """Delete earlier probes; a job that has just ended would come back to life, as Ray still watches over it."""
    before = (time.time() - SETTLED_S) * 1000
    for job in jobs.all():
        if job.kind == PROBE and job.ended and (job.ended_ms or before) < before:
            jobs.delete(job.id)


def entrypoint(python: str, arguments: list[str]) -> str:
    """The shell command of a job; `exec`, so that signals and exit code are the command's own."""
    return "exec " + shlex.join([python, "-m", ENTRY, *arguments])
