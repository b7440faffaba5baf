"""One driver for a run, whichever machine it is on: a lease in the storage that its holder renews.

Clocks of machines differ, so no time of theirs is compared. A lease that was written longer ago than it lasts, by the
storage's own clock, is taken over at once; one that isn't renewed while it is watched for that long, too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from treelora.errors import ConfigError
from treelora_platform.storage.objects import ObjectStore, StorageError

RENEW_S = 5.0
LASTS_S = 30.0
SETTLE_S = 1.0
"""Two who begin at once both write; after this long both see whose was the later."""
LEASE = "lease.json"
OWNER = ".owner"
_log = logging.getLogger(__name__)


class LeaseError(ConfigError):
    """The run is being executed on another machine."""


@dataclass(frozen=True)
class _Holding:
    owner: str
    host: str
    beat: int


class Lease:
    """The lease of one run.

    Args:
        store: Where it is.
        name: Of the run there.
        run_dir: The run's folder here, whose lock the caller holds: a lease that was taken from this folder belongs to
            a process that has ended, and is taken over at once.
        on_lost: Called in a thread when another process has taken the run over, which it does only after this one
            couldn't renew its lease for `LASTS_S` seconds.
    """

    def __init__(self, store: ObjectStore, name: str, run_dir: Path, on_lost: Callable[[], None]) -> None:
        self._store, self._name, self._run_dir, self._on_lost = store, f"{name}/{LEASE}", run_dir, on_lost
        self._run, self._owner, self._beat = name, secrets.token_hex(16), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="storage-lease", daemon=True)
        self.lost_to: str | None = None
        """Host of the process that took the run over."""

    def acquire(self) -> None:
        """Take the lease, and keep renewing it.

        Raises:
            LeaseError: another process renews it.
            StorageError: the storage doesn't answer.
        """
        if (holding := self._read()) and holding.owner != self._predecessor():
            self._watch(holding)
        self.remember()
        self._write()
        time.sleep(SETTLE_S)
        if (holding := self._read()) and holding.owner != self._owner:
            raise self._refusal(holding)
        self._thread.start()

    def remember(self) -> None:
        """Note in the run's folder that the lease was taken from there."""
        (self._run_dir / OWNER).write_text(self._owner, encoding="utf-8")

    def release(self) -> None:
        """Give the lease back; if the storage doesn't answer it runs out by itself."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(RENEW_S)  # it may be waiting for a storage that doesn't answer
        with contextlib.suppress(StorageError):
            if (holding := self._read()) and holding.owner == self._owner:
                self._store.remove(self._name)

    def _watch(self, holding: _Holding) -> None:
        """Wait until a lease runs out."""
        if self._age() > LASTS_S:
            return
        _log.warning("%s: waiting up to %g s for the lease of %s to run out", self._name, LASTS_S, holding.host)
        end = time.monotonic() + LASTS_S
        while time.monotonic() < end:
            time.sleep(RENEW_S / 5)
            now = self._read()
            if now is None:
                return
            if now != holding:
                raise self._refusal(now)

    def _age(self) -> float:
        """Seconds since the lease was written, by the storage's clock; 0 where it tells no times."""
        probe = f"{self._name}.{self._owner}"
        self._store.write(probe, b"")
        now, then = self._store.written_at(probe), self._store.written_at(self._name)
        self._store.remove(probe)
        return now - then if now and then else 0.0

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            with contextlib.suppress(StorageError):  # whoever can't reach it may reach it later
                holding = self._read()
                if holding and holding.owner != self._owner:
                    self.lost_to = holding.host
                    self._on_lost()
                    return
                self._write()

    def _read(self) -> _Holding | None:
        data = self._store.read(self._name)
        try:
            return _Holding(**json.loads(data)) if data else None
        except (ValueError, TypeError):
            return None  # torn or altered: nobody can rely on it

    def _write(self) -> None:
        self._beat += 1
        holding = _Holding(self._owner, socket.gethostname(), self._beat)
        self._store.write(self._name, json.dumps(asdict(holding)).encode())

    def _predecessor(self) -> str | None:
        try:
            return (self._run_dir / OWNER).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def _refusal(self, holding: _Holding) -> LeaseError:
        return LeaseError(
            f"run {self._run!r} in {self._store.address} is being executed on {holding.host}; wait for its end, or "
            "choose another name"
        )
