"""Where a result comes from: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = ("treelora", "torch", "transformers", "peft", "ray", "deepspeed", "mlflow", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of what a result depends on, the commit of the source where it is a git checkout, and the hardware."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = _commit() or "unknown"
    found["hardware"] = f"{os.cpu_count()} x {platform.machine()}"
    return found


def differing(found: Sequence[Mapping[str, str]]) -> list[str]:
    """What isn't the same on all ranks, a line each, from the `versions` of each."""
    lines = []
    for what in dict.fromkeys(key for versions_of_rank in found for key in versions_of_rank):
        ranks: dict[str, list[str]] = {}
        for rank, versions_of_rank in enumerate(found):
            ranks.setdefault(versions_of_rank.get(what, "unknown"), []).append(str(rank))
        if len(ranks) > 1:
            said = "; ".join(f"{version} on rank {', '.join(own)}" for version, own in ranks.items())
            lines.append(f"{what} differs between workers: {said}")
    return lines


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
