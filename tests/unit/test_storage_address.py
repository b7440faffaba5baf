"""Addresses of storages: what is taken, what is refused, and that no secret is repeated."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora.errors import ConfigError
from treelora_platform.storage.address import check_address, checked, of_run, split_run

GOOD = {
    "s3://bucket": "s3://bucket",
    "s3://bucket/a/b/": "s3://bucket/a/b",
    "s3://bucket/a?region=eu-west-1&endpoint_override=127.0.0.1:9000&scheme=http": None,
    "gs://bucket/a": None,
    "hdfs://user@namenode:8020/a": None,
    "abfss://container@account.dfs.core.windows.net/a": None,
    "file:///mnt/slow/runs/": "file:///mnt/slow/runs",
}


@pytest.mark.parametrize("address", GOOD)
def test_what_pyarrow_opens_is_taken(address: str) -> None:
    assert check_address(address) == (GOOD[address] or address)


SECRET = "hunter2"
BAD = {
    "runs": "no storage's address",
    "ftp://host/a": "no storage's address",
    "s3:bucket": "no storage's address",
    f"s3://key:{SECRET}@bucket/a": "has credentials",
    f"s3://{SECRET}@bucket/a": "has credentials",
    f"gs://{SECRET}@bucket": "has credentials",
    f"hdfs://user:{SECRET}@host/a": "has credentials",
    f"s3://bucket/a?access_key=x&secret_key={SECRET}": "has credentials",
    f"s3://bucket/a?session_token={SECRET}": "has credentials",
    f"abfss://c@a.dfs.core.windows.net/a?sas={SECRET}": "has credentials",
    f"s3://bucket?endpoint_override=user%3A{SECRET}%40host:9000": "has credentials",
    "s3://bucket?regiom=x": "'regiom' that S3 does not know; it knows region, scheme, endpoint_override",
    "s3:///a": "names no bucket",
    "file://host/a": "three slashes",
    "file:///": "three slashes",
    "s3://bucket/a/../../other": "without `..`",
    "s3://bucket/a/%2e%2e/other": "without `..`",
    "s3://bucket/a#b": "without `..`",
    "s3://bucket/a%00b": "control characters",
    "s3://[bucket": "is no address",
}


@pytest.mark.parametrize("address", BAD)
def test_what_cannot_be_one_is_refused_without_repeating_a_secret(address: str) -> None:
    with pytest.raises(ValueError, match=re.escape(BAD[address])) as caught:
        check_address(address)
    assert SECRET not in str(caught.value)


@given(
    st.text(max_size=60) | st.builds("{}://{}".format, st.sampled_from(("s3", "file", "gs", "x")), st.text(max_size=40))
)
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        found = check_address(text)
    except ValueError:
        return
    assert check_address(found) == found


def test_the_command_line_gets_our_own_error() -> None:
    with pytest.raises(ConfigError, match="the storage has credentials in it"):
        checked("s3://a:b@c")


def test_a_run_and_its_storage_are_one_address() -> None:
    storage = "s3://bucket/a?region=eu-west-1"
    assert of_run(storage, "my run") == "s3://bucket/a/my%20run?region=eu-west-1"
    assert split_run(of_run(storage, "my run")) == (storage, "my run")
    assert split_run("s3://bucket/run/") == ("s3://bucket", "run")
    with pytest.raises(ConfigError, match="names no run"):
        split_run("s3://bucket/")


def test_configurations_are_checked_without_heavy_imports() -> None:
    code = "import sys, treelora_platform.storage.address; print([m for m in ('pyarrow', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
