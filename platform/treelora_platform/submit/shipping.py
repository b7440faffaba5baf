"""What travels to the cluster: the installed package, and a folder that holds the job's own files and no others."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora.errors import ConfigError
from treelora_platform.redaction import hide_credentials

PACKAGES = ("treelora", "treelora_platform")
MOST_BYTES = 20_000_000
"""The package has about one megabyte; more is somebody's data. Ray itself refuses uploads above 100 MiB."""
STOP_WAIT_S = 120
"""Patience between SIGTERM and SIGKILL; Ray's default of 3 s is too short to draw, report and close an MLflow run."""
COMMIT_VARIABLE = "TREELORA_COMMIT"
_LEFT_OUT_FOLDERS = frozenset({"__pycache__", "tests"})
_LEFT_OUT_ENDINGS = (".pyc", ".pyo")


@dataclass(frozen=True)
class Package:
    """A copy of the installed packages, ready to be uploaded."""

    folders: tuple[Path, ...]
    files: int
    bytes: int
    digest: str
    """SHA-256 over names and contents."""


def stage_package(into: Path, packages: tuple[str, ...] = PACKAGES) -> Package:
    """Copy the installed packages without caches, tests and hidden files; of a wheel or a checkout alike.

    Raises:
        ConfigError: they hold more than `MOST_BYTES`.
    """
    found = [
        (name, path, path.relative_to(root)) for name in packages for root in [_root(name)] for path in _files(root)
    ]
    sizes = {path: path.stat().st_size for _, path, _ in found}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ConfigError(
            f"the package has {total / 1e6:.0f} MB in {len(sizes)} files, where {MOST_BYTES / 1e6:.0f} MB are the most "
            f"that is sent; move what is no code out of it, first {largest} ({sizes[largest] / 1e6:.0f} MB)"
        )
    sha = hashlib.sha256()
    for name, path, relative in found:
        content = path.read_bytes()
        target = into / name / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        sha.update(f"{name}/{relative.as_posix()}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return Package(tuple(into / name for name in packages), len(found), total, sha.hexdigest())


def _root(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise ConfigError(f"package {name!r} isn't installed as a folder, and can't be sent")
    return Path(places[0])


def _files(root: Path) -> Iterator[Path]:
    seen: set[Path] = set()
    # in a checkout, the recipes' folder is a link
    for folder, names, files in os.walk(root, followlinks=True):
        here = Path(folder)
        if here.resolve() in seen:
            names.clear()
            continue
        seen.add(here.resolve())
        names[:] = sorted(name for name in names if name not in _LEFT_OUT_FOLDERS and not name.startswith("."))
        yield from (here / name for name in sorted(files) if _travels(name))


def _travels(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(_LEFT_OUT_ENDINGS)


def stage_files(folder: Path, files: Mapping[str, str]) -> Path:
    """The job's working folder; names may have folders of their own.

    Raises:
        ConfigError: a file holds an address with a user or password.
    """
    if folder.exists():
        shutil.rmtree(folder)
    for name, text in files.items():
        refuse_credentials(text, name)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def refuse_credentials(text: str, where: str) -> None:
    """See that a text can be sent: Ray keeps it in the clear, and its dashboard shows some of it.

    Raises:
        ConfigError: it holds an address with a user or password.
    """
    if (hidden := hide_credentials(text)) != text:
        address = next(word for word in hidden.split() if "***" in word)
        raise ConfigError(
            f"{where}: {address} has a user or password in it, which would be kept in the clear on the cluster; set it "
            "in the environment of the cluster's nodes, such as MLFLOW_TRACKING_URI or AWS_ACCESS_KEY_ID"
        )


def travelling_tracking_uri() -> tuple[str | None, str | None]:
    """MLFLOW_TRACKING_URI for the job, where this machine's can be the cluster's too; and a remark where it can't.

    Raises:
        ConfigError: it has a user or password in it.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return None, None
    if hide_credentials(uri) != uri:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI {hide_credentials(uri)!r} has a user or password in it, and Ray shows a job's "
            "environment in its dashboard; set it on the cluster's nodes, and unset it here"
        )
    if uri.startswith(("http://", "https://")):
        return uri, None
    return None, f"MLFLOW_TRACKING_URI {uri!r} stays here: it isn't a server's address"


def runtime_env(package: Package, folder: Path, tracking_uri: str | None, commit: str) -> dict[str, Any]:
    """Ray's `runtime_env` of a job, with local folders: they are uploaded when it is submitted.

    Args:
        package: What runs.
        folder: The job's working folder.
        tracking_uri: MLflow's, where the job is to have it from here.
        commit: Of the package, which has left its repository.
    """
    from treelora_platform.cluster import _ENVIRONMENT

    env_vars = {
        **_ENVIRONMENT,
        # Ray's supervisor of the job reads this one from the job's own environment
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        COMMIT_VARIABLE: commit,
        **({"MLFLOW_TRACKING_URI": tracking_uri} if tracking_uri else {}),
    }
    return {"working_dir": str(folder), "py_modules": [str(path) for path in package.folders], "env_vars": env_vars}
