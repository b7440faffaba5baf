"""An ordered parallel map that never runs far ahead of its reader."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_AHEAD = 4
_MAX_THREADS = 16


def thread_count() -> int:
    """Threads worth having here: Pillow decodes without Python's lock."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MAX_THREADS)


def ordered_map(work: Callable[[A], B], items: Iterable[A], threads: int | None = None) -> Iterator[B]:
    """``map`` in threads, results in order; at most a few items a thread are held at a time."""
    count = thread_count() if threads is None else threads
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="images") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > _AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
