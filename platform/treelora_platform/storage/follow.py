"""Progress of a rank 0 on another node: the events that it has stored are appended to `events.jsonl` here."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from treelora.errors import TreeLoRAError
from treelora_platform.storage.folder import LocalState, StoredFolder

FOLLOW_S = 3.0
EVENTS = "events.jsonl"


class Follower:
    """A thread that follows from its making to `stop`."""

    def __init__(self, stored: StoredFolder, run_dir: Path) -> None:
        self._stored, self._path = StoredFolder(stored.store, stored.name), run_dir / EVENTS
        self._age: tuple[int, int] | None = None
        self._pieces: dict[str, bytes] = {}
        self._seen: bytes | None = None
        """What the storage had when it was last looked at from here; None: rank 0 wrote to the file itself since."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="storage-follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look once more, and end."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(FOLLOW_S):
            self._try()
        self._try()

    def _try(self) -> None:
        with contextlib.suppress(TreeLoRAError, OSError):  # progress is shown where there is some to show
            self.look()

    def look(self) -> None:
        """Append what is new."""
        index = self._stored.newest()
        if index is None or index.age == self._age:
            return
        state = LocalState.read(self._path.parent)
        if state and state.writing == index.epoch:  # rank 0 is here, or the driver itself wrote last
            self._seen, self._age = None, index.age
            return
        entry = index.files.get(EVENTS)
        content = self._stored.read(entry, self._pieces) if entry else b""
        here = self._path.read_bytes() if self._path.exists() else b""
        seen = here if self._seen is None else self._seen
        new = content[common(seen, content) :]
        if new:
            with self._path.open("ab") as file:
                file.write(b"\n" + new if here and not here.endswith(b"\n") else new)
        self._seen, self._age = content, index.age


def common(one: bytes, other: bytes) -> int:
    """Length of the whole lines that both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection over slices: comparing byte by byte would take seconds
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return other.rfind(b"\n", 0, low) + 1
