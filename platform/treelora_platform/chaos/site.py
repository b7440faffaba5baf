"""Where a run's Ray is: on this machine below its driver, or a cluster that somebody else has started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import psutil

from treelora.errors import ConfigError


class Site(Protocol):
    """What differs between a local Ray and a cluster; a cluster's owner brings a site of their own."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What drivers get on top of this process's environment."""

    def processes(self) -> Sequence[psutil.Process]:
        """Processes that may be the run's workers or its actor without having grown from a driver."""

    def lose_node(self, choice: float) -> Sequence[int]:
        """End a node other than the driver's, hard; `choice` (0 to 1) says which. Returns its processes' numbers."""


class LocalSite:
    """A Ray that every driver starts for itself.

    Args:
        environment: Of the drivers and of all that they start, such as Ray's own injected failures and delays.
    """

    def __init__(self, environment: Mapping[str, str] | None = None):
        self._environment = {"RAY_ADDRESS": "", **(environment or {})}

    @property
    def environment(self) -> Mapping[str, str]:
        """Nobody's cluster, and what was given."""
        return self._environment

    def processes(self) -> Sequence[psutil.Process]:
        """All of them are below the driver."""
        return ()

    def lose_node(self, choice: float) -> Sequence[int]:
        """There is but one.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("--kinds node: a local Ray has one node; this kind needs a cluster")
