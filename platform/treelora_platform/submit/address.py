"""Which cluster is meant, and whether anything answers there: all that is done before Ray is imported."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from treelora.errors import ConfigError, TreeLoRAError, one_line
from treelora_platform.redaction import hide_credentials

REACH_S = 10.0
DASHBOARD_PORT = 8265
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ClusterError(TreeLoRAError):
    """The cluster refuses, or says something that makes no sense."""


class LostContactError(ClusterError):
    """Nothing answers at the cluster's address."""


def resolve_address(given: str | None) -> str:
    """The address of the cluster's Jobs API: what was given, else the environment's.

    Raises:
        ConfigError: there is none, or it is another of Ray's addresses; with the one that is probably meant.
    """
    origin = "--address"
    if not given:
        origin = next((name for name in VARIABLES if os.environ.get(name)), "")
        given = os.environ.get(origin, "") if origin else ""
    if not given:
        raise ConfigError(
            f"no cluster is named: give --address http://HEAD:{DASHBOARD_PORT} or set {VARIABLES[0]}; Ray's dashboard, "
            "which has the Jobs API, listens there"
        )
    if hide_credentials(given) != given:
        raise ConfigError(
            f"{origin} {hide_credentials(given)!r} has a user or password in it, which ends in logs; Ray's own token "
            "goes into RAY_AUTH_TOKEN_PATH"
        )
    scheme, mark, _ = given.partition("://")
    if mark and scheme in ("http", "https"):
        if not _is_url(given):
            raise ConfigError(f"{origin} {given!r} names no host or no possible port; write {scheme}://HEAD:PORT")
        return given.rstrip("/")
    host = _host(given)
    meant = f"http://{host}:{DASHBOARD_PORT}"
    if mark and scheme == "ray":
        what = "is a Ray Client address"
    elif not mark and given.endswith(f":{DASHBOARD_PORT}"):
        what = "lacks http://"
    else:
        what = "isn't the address of a Jobs API"
    raise ConfigError(f"{origin} {given!r} {what}: jobs go to the dashboard's address, probably {meant}")


def _is_url(given: str) -> bool:
    try:
        return bool(urlsplit(given).hostname) and urlsplit(given).port != 0
    except ValueError:
        return False


def _host(given: str) -> str:
    name = urlsplit(given if "://" in given else f"//{given}").hostname or "HEAD"
    return "HEAD" if name in ("auto", "local") else f"[{name}]" if ":" in name else name


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine alone, such as the near end of an SSH tunnel."""
    return urlsplit(address).hostname in _LOOPBACK


def authentication_mode(address: str) -> str:
    """`token` or `disabled`, as the cluster says; whoever answers within `REACH_S` seconds is Ray's dashboard.

    Raises:
        LostContactError: nothing answers in time.
        ClusterError: something else answers.
    """

    def ask() -> Any:
        import requests

        answer = requests.get(f"{address}/api/authentication_mode", timeout=REACH_S)
        if answer.status_code == 404:  # before token authentication
            answer = requests.get(f"{address}/api/version", timeout=REACH_S)
            return {"authentication_mode": "disabled"} if "ray_version" in answer.json() else {}
        return answer.json()

    said = _within(REACH_S, ask, address)
    mode = said.get("authentication_mode") if isinstance(said, dict) else None
    if not isinstance(mode, str):
        raise ClusterError(f"{address}: something answers there, but it isn't Ray's dashboard; is the port right?")
    return mode


def _within(seconds: float, function: Callable[[], Any], address: str) -> Any:
    """What a function returns; name servers and many addresses of one host know no time limit of their own."""
    import requests

    found: list[Any] = []

    def work() -> None:
        try:
            found.append(function())
        except (requests.RequestException, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found or isinstance(found[0], requests.Timeout):
        raise LostContactError(f"{address}: no answer within {seconds:g} s; is the cluster up, the tunnel open?")
    if isinstance(found[0], requests.RequestException) and not isinstance(found[0], ValueError):
        raise LostContactError(f"{address}: nothing answers there ({reason(found[0])}); is the cluster up?")
    return {} if isinstance(found[0], Exception) else found[0]


def reason(error: BaseException) -> str:
    """The operating system's words for why a connection failed, which libraries wrap several times."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror and not cause.filename:
            return cause.strerror.lower()
        inner = [part for part in (*cause.args, getattr(cause, "reason", None)) if isinstance(part, BaseException)]
        cause = cause.__cause__ or cause.__context__ or (inner[0] if inner else None)
    return one_line(error)


def token_source() -> str | None:
    """Where Ray will take the token from, in its own order of precedence; None: there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = token_file()
    return str(path) if path.is_file() else None


def token_file() -> Path:
    """The file that the token is in, unless the environment has it."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path("~/.ray/auth_token").expanduser()


def readable_by_others(path: Path) -> bool:
    """Whether other users of this machine can read a file."""
    return path.is_file() and bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
