"""Imports without what they drag along and nobody uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(module: str) -> Iterator[None]:
    """Let imports find an optional module missing that would take long, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # what makes `import` raise ImportError
    try:
        yield
    finally:
        del sys.modules[module]
