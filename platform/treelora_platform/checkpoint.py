"""Commits: everything needed to go on, written by rank 0 and read by every rank of the next attempt.

A commit is a folder `checkpoints/<global step>-<unit>-<phase>/` of safetensors and JSON whose manifest, with a SHA-256
of every file and of the adapters that it builds on, is written last; the folder then gets its name by one rename. What
is incomplete or altered is therefore seen, and the commit before it is used. `ray.train.report` plays no part: its
return doesn't promise that anything is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from treelora.errors import CheckpointError
from treelora.loop_records import Position

if TYPE_CHECKING:  # the driver looks for commits too, and a new run has none: it would wait for torch in vain
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
PARTS = ("adapter", "head", "alignment", "optimizer", "method", "memory", "evaluator")


@dataclass(frozen=True)
class Commit:
    """A state that a run can go on from. Each part is a flat dict of CPU tensors; empty ones aren't stored."""

    position: Position
    adapters: tuple[str, ...] = ()
    """Folders under `adapters/`, one for each unit trained so far; units may share one."""
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def write_commit(run_dir: Path, commit: Commit, keep: int) -> Path:
    """Make a commit safe on disk, then delete all but the newest `keep`.

    Raises:
        CheckpointError: the disk refuses; the earlier commits are intact.
    """
    from safetensors.torch import save_file

    folder = run_dir / "checkpoints"
    position = commit.position
    name = (
        f"{position.global_step:08d}-{position.unit:04d}-{'trained' if position.trained else 'step'}{position.step:06d}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
        for part, tensors in commit.parts.items():
            if tensors:
                path = scratch / f"{part}.safetensors"
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
                _sync(path)
        manifest = {
            "format": FORMAT,
            "position": asdict(position),
            "bank": list(commit.adapters),
            "adapters": {adapter: _known_sha256(_adapter_file(run_dir, adapter)) for adapter in commit.adapters},
            "files": {path.name: _sha256(path) for path in sorted(scratch.iterdir())},
        }
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(scratch / MANIFEST)
        target = folder / name
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
        _sync(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: the commit of step {position.global_step} failed: {error}") from error
    for old in list(_newest_first(run_dir))[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    _remove_unused_adapters(run_dir)
    return target


def newest_commit(run_dir: Path) -> tuple[Commit | None, list[str]]:
    """The newest commit that is whole (None where none was made yet), and what was wrong with newer ones.

    Raises:
        CheckpointError: there are commits, but none that is whole.
    """
    troubles: list[str] = []
    for folder in _newest_first(run_dir):
        try:
            return read_commit(folder), troubles
        except CheckpointError as error:
            troubles.append(str(error))
    if troubles:  # to begin anew would throw away what somebody may still mend
        raise CheckpointError(f"{run_dir}: no commit can be used; --fresh begins anew. " + "; ".join(troubles))
    return None, troubles


def newest_name(run_dir: Path) -> str:
    """Folder name of the newest commit, whole or not; empty where there is none."""
    return next((folder.name for folder in _newest_first(run_dir)), "")


def read_commit(folder: Path) -> Commit:
    """Read a commit after checking every file against its manifest.

    Raises:
        CheckpointError: something is missing, altered, or of another format.
    """
    from safetensors.torch import load_file

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {manifest['format']}, this version reads {FORMAT}")
        paths = {name: folder / _plain_name(name) for name in manifest["files"]}
        adapters = {name: _adapter_file(folder.parent.parent, _plain_name(name)) for name in manifest["adapters"]}
        for listed, found in ((manifest["files"], paths), (manifest["adapters"], adapters)):
            for name, digest in listed.items():
                if _sha256(found[name]) != digest:
                    raise CheckpointError(f"{found[name]}: differs from the checksum in {folder / MANIFEST}")
        parts = {part: load_file(paths[f"{part}.safetensors"]) for part in PARTS if f"{part}.safetensors" in paths}
        bank = tuple(manifest.get("bank", adapters))
        if set(bank) != set(adapters):
            raise CheckpointError(f"{folder}: the bank {bank} isn't made of the adapters {tuple(adapters)}")
        return Commit(_position(manifest["position"]), bank, parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a whole commit ({type(error).__name__}: {error})") from error


def _plain_name(name: str) -> str:
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} is no file name")
    return name


def _position(fields: Mapping[str, Any]) -> Position:
    position = Position(**fields)
    counts = (position.unit, position.step, position.global_step, position.passes)
    if not all(type(count) is int and count >= 0 for count in counts) or type(position.trained) is not bool:
        raise ValueError(f"impossible position {dict(fields)}")
    return replace(position, train_seconds=float(position.train_seconds))


def _adapter_file(run_dir: Path, adapter: str) -> Path:
    return run_dir / "adapters" / adapter / "adapter_model.safetensors"


def _remove_unused_adapters(run_dir: Path) -> None:
    """Delete the adapters that no commit builds on: those that were merged away under a budget."""
    used: set[str] = set()
    for folder in _newest_first(run_dir):
        try:
            used |= set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["adapters"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # a damaged commit may still be mended: nothing is deleted
    for adapter in (run_dir / "adapters").glob("[0-9]*"):
        if adapter.name not in used:
            shutil.rmtree(adapter, ignore_errors=True)


def remove_scratch(run_dir: Path) -> None:
    """Delete what an interrupted commit left behind."""
    for pattern in ("checkpoints/.writing-*", "adapters/.adapter-*", "adapters/.old-*"):
        for folder in run_dir.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _newest_first(run_dir: Path) -> Iterator[Path]:
    folders = [p for p in (run_dir / "checkpoints").glob("[0-9]*") if p.is_dir()]
    # "trained" and the next unit's first commit share a global step: unit, then phase, decide
    return iter(sorted(folders, key=lambda p: p.name, reverse=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known_sha256(path: Path) -> str:
    """Of a file that is read once, until another takes its place: hundreds of adapters would take minutes a commit."""
    seen = path.stat()
    return _sha256_as(path, seen.st_ino, seen.st_mtime_ns, seen.st_size)


@lru_cache(maxsize=100_000)
def _sha256_as(path: Path, inode: int, modified_ns: int, size: int) -> str:
    return _sha256(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
