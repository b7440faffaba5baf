"""Which cluster is meant, and what answers there."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.support.web_server import answering
from treelora.errors import ConfigError
from treelora_platform.submit import address as module
from treelora_platform.submit.address import (
    ClusterError,
    LostContactError,
    authentication_mode,
    is_loopback,
    readable_by_others,
    resolve_address,
    token_source,
)


@pytest.fixture(autouse=True)
def _no_cluster_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://head:8265", "http://head:8265"),
        ("https://head/ray/", "https://head/ray"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_an_address_of_the_jobs_api_is_taken(given: str, found: str) -> None:
    assert resolve_address(given) == found


def test_the_environment_is_asked_in_rays_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://b:8265")
    assert resolve_address(None) == "http://b:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://a:8265")
    assert resolve_address(None) == "http://a:8265"
    assert resolve_address("http://c:8265") == "http://c:8265"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ray://head:10001", "is a Ray Client address: .*probably http://head:8265$"),
        ("head:6379", "isn't the address of a Jobs API: .*probably http://head:8265$"),
        ("head:8265", "lacks http://: .*probably http://head:8265$"),
        ("10.0.0.1", "isn't the address of a Jobs API: .*probably http://10.0.0.1:8265$"),
        ("auto", "probably http://HEAD:8265$"),
        ("anyscale://cluster", "isn't the address of a Jobs API"),
        ("http://", "names no host"),
        ("http://head:port", "no possible port"),
        ("http://head:99999", "no possible port"),
    ],
)
def test_other_addresses_are_refused_with_the_right_one(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_address(given)


def test_a_wrong_address_in_the_environment_is_named_after_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS '10.0.0.1:6379' isn't"):
        resolve_address(None)


def test_no_address_at_all() -> None:
    with pytest.raises(ConfigError, match="give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS"):
        resolve_address(None)


def test_a_password_in_the_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_address("https://me:hunter2@head")
    assert "hunter2" not in str(refused.value)
    assert "RAY_AUTH_TOKEN_PATH" in str(refused.value)


def test_loopback() -> None:
    assert [is_loopback(f"http://{host}:1") for host in ("localhost", "127.0.0.1", "[::1]", "head")] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_the_cluster_says_whether_it_wants_a_token(mode: str) -> None:
    with answering({"/api/authentication_mode": (200, {"authentication_mode": mode})}) as url:
        assert authentication_mode(url) == mode


def test_a_cluster_older_than_tokens() -> None:
    with answering({"/api/version": (200, {"ray_version": "2.40.0"})}) as url:
        assert authentication_mode(url) == "disabled"


@pytest.mark.parametrize("body", ["<html>", {"hello": 1}, [1]])
def test_something_else_answers(body: object) -> None:
    with (
        answering({"/api/authentication_mode": (200, body)}) as url,
        pytest.raises(ClusterError, match="it isn't Ray's dashboard"),
    ):
        authentication_mode(url)


def test_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(
        LostContactError, match=rf"^http://127.0.0.1:{port}: nothing answers there \(connection refused\)"
    ):
        authentication_mode(f"http://127.0.0.1:{port}")


def test_who_accepts_and_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REACH_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(LostContactError, match=r"no answer within 0.5 s"):
            authentication_mode(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - begun < 60


def test_where_the_token_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_source() is None
    default = tmp_path / ".ray" / "auth_token"
    default.parent.mkdir()
    default.write_text("t")
    assert token_source() == str(default)
    named = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert token_source() is None
    named.write_text("t")
    assert token_source() == str(named)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    assert token_source() == "RAY_AUTH_TOKEN"


def test_a_token_that_others_can_read_is_seen(tmp_path: Path) -> None:
    token = tmp_path / "token"
    assert not readable_by_others(token)
    token.touch(mode=0o600)
    assert not readable_by_others(token)
    token.chmod(0o644)
    assert readable_by_others(token)
