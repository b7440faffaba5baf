"""The driver's side: the run is brought here, kept for this driver alone, handed to the workers, fetched at its end."""

from __future__ import annotations

import _thread
import contextlib
import filecmp
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from treelora.data import TaskStream, open_task
from treelora.errors import ConfigError, DataError, TreeLoRAError
from treelora_platform.checkpoint import newest_name
from treelora_platform.config import ExperimentConfig
from treelora_platform.prepare import PreparedStream, prepare_stream
from treelora_platform.run_tables import read_run_json
from treelora_platform.storage.address import checked
from treelora_platform.storage.folder import StoredFolder
from treelora_platform.storage.follow import Follower
from treelora_platform.storage.keeper import DRIVER, shared_ending
from treelora_platform.storage.lease import Lease, LeaseError
from treelora_platform.storage.node import TASKS, patiently, tasks_folder
from treelora_platform.storage.objects import open_storage
from treelora_platform.storage.snapshot import look
from treelora_platform.storage.writer import FencedError, Writer

COLLECT_S = 30.0


class NoStorage:
    """All nodes see the run's folder: nothing has to be brought or sent."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the run for this driver alone.

        Raises:
            LeaseError: another machine executes it, or has taken it over.
        """
        yield

    def bring(self, fresh: bool) -> None:
        """Make the run's folder hold what is stored, unless it is ahead; `fresh`: what is stored will be forgotten.

        Raises:
            TreeLoRAError: see `StoredFolder.bring`.
        """

    def send(self) -> None:
        """Store the run's folder.

        Raises:
            StorageError: the storage doesn't answer.
        """

    def prepared(self, config: ExperimentConfig) -> PreparedStream:
        """The tasks; those that the run was begun with, where they are stored and their source isn't here.

        Raises:
            DataError, ConfigError: see `prepare_stream`.
        """
        return prepare_stream(config)

    def handed_over(self, job: dict[str, Any], prepared: PreparedStream) -> dict[str, Any]:
        """The job as workers on any node can take it."""
        return job

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Keep `events.jsonl` here up to date while rank 0 writes it elsewhere."""
        yield

    def newest_name(self) -> str:
        """Folder name of the newest commit."""
        return newest_name(self.run_dir)

    def collect(self, hurry: bool) -> str | None:
        """Bring here what rank 0 has left; None, or why that can't be done. `hurry`: ask only once."""
        return None

    def close(self) -> str | None:
        """Store what the driver has added at the end; None, or what is not stored and how to send it."""
        return None


class RunStorage(NoStorage):
    """A run's folder is stored at `cluster.storage`; see the methods of `NoStorage`.

    Raises:
        StorageError: the storage doesn't answer, or refuses.
    """

    def __init__(self, config: ExperimentConfig, run_dir: Path, address: str) -> None:
        super().__init__(run_dir)
        self._store, self._root = open_storage(checked(address)), config.output_dir
        self._stored = StoredFolder(self._store, run_dir.name)
        self._lease = Lease(self._store, run_dir.name, run_dir, _thread.interrupt_main)
        self._anew = False
        self._token = secrets.token_hex(16)

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `NoStorage`."""
        self._lease.acquire()
        try:
            yield
        except KeyboardInterrupt:
            if self._lease.lost_to is None:
                raise
            raise LeaseError(
                f"{self._lease.lost_to} has taken run {self.run_dir.name!r} over while the storage was out of reach "
                "from here; this process has stopped"
            ) from None
        finally:
            self._lease.release()

    def bring(self, fresh: bool) -> None:
        """See `NoStorage`."""
        self._lease.remember()  # `--fresh` has deleted it
        self._anew = fresh
        if not fresh:
            self._stored.bring(self.run_dir)

    def send(self) -> None:
        """See `NoStorage`."""
        Writer(self._stored, self.run_dir, anew=self._anew).push(look(self.run_dir))
        self._anew = False

    def prepared(self, config: ExperimentConfig) -> PreparedStream:
        """See `NoStorage`."""
        try:
            return prepare_stream(config)
        except DataError:
            record = read_run_json(self.run_dir)
            fingerprint = str(record.get("data_hash"))
            stored = StoredFolder(self._store, f"{TASKS}/{fingerprint}")
            if not fingerprint.isalnum() or record.get("config_hash") != config.digest() or stored.newest() is None:
                raise
        folder = tasks_folder(self.run_dir.parent, fingerprint)
        stored.pull(folder)
        return PreparedStream(TaskStream([open_task(path) for path in sorted(folder.iterdir()) if path.is_dir()]), {})

    def handed_over(self, job: dict[str, Any], prepared: PreparedStream) -> dict[str, Any]:
        """See `NoStorage`."""
        fingerprint = prepared.fingerprint()
        folder = tasks_folder(self.run_dir.parent, fingerprint)
        tasks = []
        for number, task in enumerate(prepared.stream):
            inside = f"{number:04d}-{task.slug}"
            splits = {split: f"{inside}/{split}.parquet" for split in task.splits}
            for split, path in splits.items():
                _place(Path(task.path(split)), folder / path)
            tasks.append(asdict(task) | {"splits": splits})
        stored = StoredFolder(self._store, f"{TASKS}/{fingerprint}")
        if stored.newest() is None:
            with contextlib.suppress(FencedError):  # another run of the same tasks was a moment faster
                Writer(stored, folder).push(look(folder))
        (self.run_dir / DRIVER).write_text(self._token, encoding="utf-8")
        plan = {
            "address": self._store.address,
            "name": self.run_dir.name,
            # `~` is each node's own
            "root": self._root if self._root.startswith("~") else str(self.run_dir.parent),
            "tasks": fingerprint,
            "token": self._token,
        }
        return job | {"tasks": tasks, "storage": plan}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """See `NoStorage`."""
        follower = Follower(self._stored, self.run_dir)
        try:
            yield
        finally:
            follower.stop()

    def newest_name(self) -> str:
        """See `NoStorage`."""
        try:
            index = self._stored.newest()
        except TreeLoRAError:
            index = None
        return max(newest_name(self.run_dir), index.newest_commit() if index else "")

    def collect(self, hurry: bool) -> str | None:
        """See `NoStorage`."""
        if self._lease.lost_to is not None or shared_ending(self.run_dir, self._token):
            return None
        try:
            patiently(lambda: self._stored.bring(self.run_dir), 0.0 if hurry else COLLECT_S)
        except (TreeLoRAError, OSError) as error:
            return f"{error}; what the workers did last is not here yet"
        return None

    def close(self) -> str | None:
        """See `NoStorage`."""
        if self._lease.lost_to is not None:
            return None
        try:
            self.send()
        except (TreeLoRAError, OSError) as error:
            return f"{error}; `treelora storage push {self.run_dir}` sends the rest"
        return None


def storage_of(config: ExperimentConfig, run_dir: Path) -> NoStorage:
    """What keeps a run, by its configuration.

    Raises:
        StorageError: a storage is named, and doesn't answer or refuses.
    """
    address = config.cluster.storage
    return RunStorage(config, run_dir, address) if address else NoStorage(run_dir)


def push_run(run_dir: Path, address: str, name: str) -> None:
    """Store a run's folder that no process writes to: `treelora storage push`.

    Raises:
        ConfigError: the storage has something newer, or the run is being executed.
    """
    store = open_storage(checked(address))
    stored, lease = StoredFolder(store, name), Lease(store, name, run_dir, _thread.interrupt_main)
    lease.acquire()
    try:
        index = stored.newest()
        if index and stored.is_newer(index, run_dir):
            raise ConfigError(
                f"{run_dir}: {store.address} has something newer; `treelora storage fetch` brings it here"
            )
        Writer(stored, run_dir).push(look(run_dir))
    finally:
        lease.release()


def _place(source: Path, target: Path) -> None:
    """Make a file lie at another place too, with the same bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
