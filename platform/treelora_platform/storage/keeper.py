"""Rank 0's side: every commit is stored while the run goes on, by a thread of its own.

No step and no commit waits for the network. Where commits come faster than they can be sent, the newest that is waiting
replaces the one before; a machine that is lost costs what wasn't sent, and the run resumes at the commit before.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from treelora.errors import CheckpointError
from treelora_platform.background import BackgroundSender
from treelora_platform.storage.folder import StoredFolder
from treelora_platform.storage.snapshot import Snapshot, clear_outgoing, take
from treelora_platform.storage.writer import FencedError, Writer

LAST_PUSH_S = 120.0
"""How long the end of a run waits for a storage that doesn't answer."""
DRIVER, ENDED = ".driver", ".ended"
_log = logging.getLogger(__name__)


class _Sending:
    """What the thread does; the newest snapshot waits here."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.fenced: str | None = None
        self._lock = threading.Lock()
        self._waiting: Snapshot | None = None

    def offer(self, snapshot: Snapshot) -> None:
        """In the place of one that still waits."""
        with self._lock:
            before, self._waiting = self._waiting, snapshot
        if before:
            before.drop()

    def send(self, deadline: float) -> bool:
        """See `background.Sends`."""
        with self._lock:
            snapshot, self._waiting = self._waiting, None
        if snapshot is None:
            return True
        done = bool(self.fenced)
        try:
            done = done or self.writer.push(snapshot, deadline)
        except FencedError as error:
            self.fenced, done = str(error), True
        finally:
            if done or not self._put_back(snapshot):
                snapshot.drop()
        return done

    def _put_back(self, snapshot: Snapshot) -> bool:
        """Let it wait again, unless a newer one does."""
        with self._lock:
            self._waiting, free = self._waiting or snapshot, self._waiting is None
        return free


class Keeper:
    """Stores a run's folder while it is written; belongs to the thread that writes it.

    Args:
        stored: Where; the folder here is brought to what it holds before.
        run_dir: The run's folder here.
        token: The driver's, which finds it again where it shares the folder.
        tell: Gets (kind, what) of an event that people should see.

    Raises:
        StorageError, FencedError: the writer before can't be relieved.
    """

    def __init__(self, stored: StoredFolder, run_dir: Path, token: str, tell: Callable[[str, str], None]) -> None:
        clear_outgoing(run_dir)
        self._stored, self._run_dir, self._token, self._tell = stored, run_dir, token, tell
        self._writer = Writer(stored, run_dir)
        self._writer.claim()
        self._sending = _Sending(self._writer)
        self._sender = BackgroundSender(lambda: self._sending, "storage")
        self._trouble: str | None = None
        self._unoffered: str | None = None
        self._told_fenced = False

    def notify(self) -> None:
        """The folder has changed and is whole: there is a commit, a part of a table, or a task's end."""
        self._offer()
        self._tell_changes()

    def close(self, timeout_s: float = LAST_PUSH_S) -> None:
        """Store what is left; nobody is told of anything any more.

        Where the storage doesn't answer, and the driver shares the folder, it is the driver who says so.

        Raises:
            CheckpointError: it doesn't answer; says where the run is, and how it gets there.
        """
        self._offer()
        drained = self._sender.close(timeout_s)
        shared = _read(self._run_dir / DRIVER) == self._token
        (self._run_dir / ENDED).write_text(self._token, encoding="utf-8")
        clear_outgoing(self._run_dir)
        if (not drained or self._unoffered) and not shared:
            reason = self._unoffered or self._sender.last_error or "no answer"
            raise CheckpointError(
                f"the last commits of run {self._stored.name} are in {self._run_dir} on {socket.gethostname()} and not "
                f"in the storage ({reason}); `treelora storage push {self._run_dir}` there sends them"
            )

    def flush(self, timeout_s: float) -> bool:
        """Store what is left of a machine that is about to be taken away; whether all was."""
        self._offer()
        return self._sender.close(timeout_s) and not self._unoffered

    def _offer(self) -> None:
        self._unoffered = None
        try:
            self._sending.offer(take(self._run_dir, self._writer.is_known))
        except OSError as error:  # the disk is full, say: no reason to end a run
            self._unoffered = str(error)
        self._sender.notify()

    def _tell_changes(self) -> None:
        if self._sending.fenced and not self._told_fenced:
            self._told_fenced = True
            self._tell("warning", f"{self._sending.fenced}; nothing more is stored from here")
        before, self._trouble = self._trouble, self._unoffered or self._sender.last_error
        if self._trouble and not before:
            self._tell("warning", f"not stored: {self._trouble}; tried again in the background, the run goes on")
        elif before and not self._trouble:
            self._tell("note", "the run is being stored again")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def shared_ending(run_dir: Path, token: str) -> bool:
    """Whether rank 0 wrote this very folder to the end of the stream."""
    return _read(run_dir / ENDED) == token
