"""Versions: what the project requires, what this machine has, and what the nodes have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata

FALLBACK = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "mlflow",
    "pyarrow",
    "numpy",
    "pydantic",
    "typer",
    "safetensors",
)


def requirements() -> dict[str, str]:
    """Required packages and their version conditions, as installed here; names alone where nothing is installed."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        texts = metadata.requires("treelora") or []
    except metadata.PackageNotFoundError:
        return dict.fromkeys(FALLBACK, "")
    found = {}
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = str(requirement.specifier)
    return found


def public(version: str) -> str:
    """A version without its local part: torch 2.13.0+cpu and 2.13.0+cu126 are one version."""
    return version.partition("+")[0]


def satisfies(version: str, condition: str) -> bool:
    """Whether a version fulfils a condition such as `>=2.9`; what can't be read is taken to."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(condition).contains(Version(public(version)), prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return True


def minor(version: str) -> str:
    """`3.11` of `3.11.7`."""
    return ".".join(re.findall(r"\d+", version)[:2])


def at_odds(by_node: Mapping[str, Mapping[str, str | None]]) -> dict[str, dict[str, list[str]]]:
    """Packages that nodes have different versions of: package -> version -> nodes."""
    found: dict[str, dict[str, list[str]]] = {}
    names: Sequence[str] = list(dict.fromkeys(name for versions in by_node.values() for name in versions))
    for name in names:
        groups: dict[str, list[str]] = {}
        for node, versions in by_node.items():
            if version := versions.get(name):
                groups.setdefault(public(version), []).append(node)
        if len(groups) > 1:
            found[name] = groups
    return found


def here(names: Sequence[str]) -> dict[str, str | None]:
    """What this machine has of them."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
