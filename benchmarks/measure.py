"""What every benchmark prints beside its figures: medians with their spread, versions, machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from treelora_platform import provenance

CPU_INFO = Path("/proc/cpuinfo")


def spread(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """`median (q1 to q3)` of the values times `scale`."""
    low, middle, high = scale * np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def tail(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """`median / 99th percentile` of the values times `scale`."""
    return " / ".join(f"{scale * np.quantile(values, q):,.{digits}f}" for q in (0.5, 0.99))


def machine() -> str:
    """Model and number of cores, memory in GiB, and how busy it is: the load of the last minute."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} x {model}, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}"


def versions() -> str:
    """Of Python, of what results depend on, and of the source."""
    found = provenance.versions() | {"numpy": np.__version__}
    del found["hardware"]
    return ", ".join(f"{name} {version}" for name, version in found.items())


def footer() -> str:
    """`machine` and `versions`, a line each: a table's caption."""
    return f"{machine()}\n{versions()}"
