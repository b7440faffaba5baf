"""A thread that keeps trying to get something done while somebody else must not wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from treelora.errors import one_line

BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_log = logging.getLogger(__name__)


class Sends(Protocol):
    """Whatever sends what is new."""

    def send(self, deadline: float) -> bool:
        """Send all that is unsent; False if `deadline` (monotonic clock, s) came first. May raise."""


class BackgroundSender:
    """Opens a `Sends` in a daemon thread and calls it after a `notify`; on failure again after 0.2 to 30 s.

    `last_error` is None while all goes well. No method but `close` waits, and that at most for its time-out.
    """

    def __init__(self, open_sender: Callable[[], Sends], name: str) -> None:
        self.last_error: str | None = None
        self._open_sender = open_sender
        self._wake, self._closing = threading.Event(), threading.Event()
        self._deadline = float("inf")
        self._drained = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def notify(self) -> None:
        """There is something new. Returns at once; the first call starts the thread."""
        if self._thread.ident is None:
            self._thread.start()
        self._wake.set()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Try to send everything within `timeout_s` seconds; True if nothing is left. Ends the thread."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self.notify()
        self._thread.join(timeout_s)
        return self._drained

    def _run(self) -> None:
        sender: Sends | None = None
        failures = 0
        while True:
            if not failures:
                self._wake.wait()
            elif self._closing.wait(BACKOFF_S[min(failures, len(BACKOFF_S)) - 1]):
                time.sleep(BACKOFF_S[0])
            self._wake.clear()  # before `closing` is read: whoever calls later is heard in the next round
            closing = self._closing.is_set()
            try:
                sender = sender or self._open_sender()
                all_sent = sender.send(self._deadline)
                failures, self.last_error = 0, None
            # whatever is wrong here must not reach those who do not wait; what is unsent stays where it is
            except Exception as error:  # noqa: BLE001
                all_sent, failures = False, failures + 1
                self.last_error = one_line(error)
                if failures == 1:
                    _log.warning("%s: %s; will try again", self._thread.name, self.last_error)
                    _log.debug("%s: the failure in full", self._thread.name, exc_info=True)
            if closing and (all_sent or time.monotonic() > self._deadline):
                self._drained = all_sent
                return
