"""Addresses of storages, judged by their text alone; free of pyarrow, because configurations are checked with this."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from treelora.errors import ConfigError
from treelora_platform.redaction import is_secret

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
S3_OPTIONS = ("region", "scheme", "endpoint_override")
_NAMED_USERS = ("abfs", "abfss", "hdfs", "viewfs")  # `container@account`, `user@host`: names, where no password follows
_SECRETIVE = re.compile(r"sas|signature|credential|kerb", re.IGNORECASE)


def check_address(address: str) -> str:
    """See that an address can be a storage's, and holds no credentials: configurations are recorded.

    Returns:
        The address without a slash at its end.

    Raises:
        ValueError: what is wrong with it, without repeating a secret.
    """
    try:
        parts = urlsplit(address)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise ValueError(f"is no address ({error})") from None
    if parts.scheme not in SCHEMES or "://" not in address:
        raise ValueError("is no storage's address; write s3://bucket/folder, gs://bucket/folder or file:///folder")
    user, at, _ = parts.netloc.rpartition("@")
    secret = next((key for key in options if is_secret(key) or _SECRETIVE.search(key)), None)
    if (at and (parts.scheme not in _NAMED_USERS or ":" in user)) or secret or any("@" in v for v in options.values()):
        raise ValueError(
            "has credentials in it, and configurations are recorded; give them in the environment, as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
        )
    if parts.fragment or ".." in unquote(parts.path).split("/") or re.search(r"[\x00-\x1f\\]", unquote(address)):
        raise ValueError("must be a plain folder, without `..`, `#` or control characters")
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        raise ValueError("must be file:///folder, with three slashes")
    if parts.scheme != "file" and not parts.netloc:
        raise ValueError(f"names no bucket; write {parts.scheme}://bucket/folder")
    if parts.scheme == "s3" and (unknown := [key for key in options if key not in S3_OPTIONS]):
        raise ValueError(f"has an option {unknown[0]!r} that S3 does not know; it knows {', '.join(S3_OPTIONS)}")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), parts.query, ""))


def checked(address: str) -> str:
    """`check_address` for the command line.

    Raises:
        ConfigError: names the storage, where that gives no secret away.
    """
    try:
        return check_address(address)
    except ValueError as error:
        raise ConfigError(f"the storage {error}") from None


def split_run(address: str) -> tuple[str, str]:
    """Storage and run of `s3://bucket/folder/run?region=...`."""
    parts = urlsplit(checked(address))
    folder, _, run = parts.path.rpartition("/")
    if not run:
        raise ConfigError(f"{address}: names no run; write the storage's address, a slash, and the run's name")
    return urlunsplit(parts._replace(path=folder)), unquote(run)


def of_run(address: str, run: str) -> str:
    """The address of a run in a storage, for people: `split_run` the other way round."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path}/{quote(run)}"))
