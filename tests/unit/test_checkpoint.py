"""Commits: what is written comes back, what is damaged is passed over, and their order."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.support.streams import commits, same_adapter
from treelora.errors import CheckpointError
from treelora.loop_records import Position
from treelora_platform import checkpoint
from treelora_platform.checkpoint import (
    MANIFEST,
    Commit,
    newest_commit,
    read_commit,
    remove_scratch,
    write_commit,
)

ADAPTERS = ("0000-first", "0001-second")


def tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 4, generator=g), "b.c/d": torch.arange(5), "t": torch.randn(4, 3, generator=g).T}


def commit(global_step: int = 7, unit: int = 1, step: int = 3, trained: bool = False) -> Commit:
    parts = {"adapter": tensors(global_step), "memory": tensors(-1), "optimizer": {}}
    return Commit(Position(unit, step, trained, global_step, 1.5), ADAPTERS, parts)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for number, name in enumerate(ADAPTERS):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        save_file({"x": torch.full((2,), float(number))}, tmp_path / "adapters" / name / "adapter_model.safetensors")
    return tmp_path


def equal(one: Commit, other: Commit) -> bool:
    parts = [{name: dict(part) for name, part in c.parts.items() if part} for c in (one, other)]
    return (one.position, one.adapters) == (other.position, other.adapters) and (
        parts[0].keys() == parts[1].keys() and all(same_adapter(parts[0][name], parts[1][name]) for name in parts[0])
    )


def test_round_trip(run_dir: Path) -> None:
    path = write_commit(run_dir, commit(), keep=2)
    assert equal(read_commit(path), commit())
    found, troubles = newest_commit(run_dir)
    assert found
    assert equal(found, commit())
    assert troubles == []
    assert sorted(entry.name for entry in path.iterdir()) == [
        "adapter.safetensors",
        MANIFEST,
        "memory.safetensors",
    ]


def test_there_is_none_yet(tmp_path: Path) -> None:
    assert newest_commit(tmp_path) == (None, [])


def test_the_newest_are_kept(run_dir: Path) -> None:
    for step in range(1, 6):
        write_commit(run_dir, commit(global_step=step), keep=2)
    assert [read_commit(path).position.global_step for path in commits(run_dir)] == [4, 5]


def test_a_commit_made_again_replaces_the_old_one(run_dir: Path) -> None:
    write_commit(run_dir, commit(), keep=2)
    other = Commit(commit().position, ADAPTERS[:1], {"adapter": tensors(99)})
    write_commit(run_dir, other, keep=2)
    assert len(commits(run_dir)) == 1
    assert equal(read_commit(commits(run_dir)[0]), other)


def test_order_of_commits_that_share_a_global_step(run_dir: Path) -> None:
    """Within a task, its end, the next task's beginning; and numbers count as numbers."""
    in_order = [
        commit(4, 0, 4),
        commit(5, 0, 5),
        commit(5, 0, 5, trained=True),
        commit(5, 1, 0),
        commit(6, 1, 1),
        commit(10, 1, 5),
        commit(10, 1, 5, trained=True),
        commit(10, 2, 0),
        commit(100_000, 10, 3),
    ]
    random.Random(0).shuffle(shuffled := list(in_order))
    for one in shuffled:
        write_commit(run_dir, one, keep=100)
    for one in reversed(in_order):
        found, _ = newest_commit(run_dir)
        assert found
        assert found.position == one.position
        shutil.rmtree(commits(run_dir)[-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def point_outside(manifest: dict[str, Any]) -> None:
    manifest["files"]["../../secret"] = manifest["files"].pop("memory.safetensors")


DAMAGE: dict[str, Any] = {
    "a flipped byte": lambda p: flip(p / "adapter.safetensors"),
    "a flipped byte in a part that is named last": lambda p: flip(p / "memory.safetensors"),
    "a cut file": lambda p: os.truncate(p / "memory.safetensors", 20),
    "a missing file": lambda p: (p / "memory.safetensors").unlink(),
    "no manifest": lambda p: (p / MANIFEST).unlink(),
    "a cut manifest": lambda p: os.truncate(p / MANIFEST, 60),
    "an empty manifest": lambda p: (p / MANIFEST).write_text(""),
    "a nest": lambda p: (p / MANIFEST).write_text("[" * 100_000),
    "another format": lambda p: edit(p, lambda m: m.update(format=99)),
    "no adapters": lambda p: edit(p, lambda m: m.pop("adapters")),
    "a path out of the folder": lambda p: edit(p, point_outside),
    "an adapter out of the run": lambda p: edit(p, lambda m: m["adapters"].update({"../../x": "0"})),
    "an absolute adapter": lambda p: edit(p, lambda m: m["adapters"].update({"/etc": "0"})),
    "an adapter named ..": lambda p: edit(p, lambda m: m["adapters"].update({"..": "0"})),
    "a negative step": lambda p: edit(p, lambda m: m["position"].update(step=-1)),
    "a text for a step": lambda p: edit(p, lambda m: m["position"].update(step="3")),
    "an unknown field": lambda p: edit(p, lambda m: m["position"].update(steps=3)),
    "a number for a flag": lambda p: edit(p, lambda m: m["position"].update(trained=1)),
    "another adapter": lambda p: flip(p.parents[1] / "adapters" / "0002-new" / "adapter_model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_commit_is_passed_over(damage: str, run_dir: Path) -> None:
    write_commit(run_dir, commit(global_step=7), keep=3)
    shutil.copytree(run_dir / "adapters" / ADAPTERS[0], run_dir / "adapters" / "0002-new")
    newer = commit(global_step=8)
    path = write_commit(run_dir, Commit(newer.position, (*ADAPTERS, "0002-new"), newer.parts), keep=3)
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError, match=path.parent.parent.name):
        read_commit(path)
    found, troubles = newest_commit(run_dir)
    assert found
    assert equal(found, commit(global_step=7))
    assert len(troubles) == 1


def test_without_one_whole_commit_nothing_is_begun_anew(run_dir: Path) -> None:
    for step in (1, 2):
        flip(write_commit(run_dir, commit(global_step=step), keep=3) / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"no commit can be used; --fresh begins anew.*00000002.*00000001"):
        newest_commit(run_dir)


def test_an_adapter_shared_by_all_commits(run_dir: Path) -> None:
    write_commit(run_dir, commit(), keep=3)
    flip(run_dir / "adapters" / ADAPTERS[0] / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"0000-first.adapter_model.safetensors: differs from the checksum"):
        newest_commit(run_dir)


def test_an_adapter_is_read_once_until_another_takes_its_place(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.parent.name)
        return checksum(path)

    checksum = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", counted)
    for step in (1, 2):
        write_commit(run_dir, commit(global_step=step), keep=3)
    assert [name for name in read if name in ADAPTERS] == list(ADAPTERS)

    other = run_dir / "other"
    save_file({"a": torch.full((3,), 7.0)}, other)
    os.replace(other, run_dir / "adapters" / ADAPTERS[1] / "adapter_model.safetensors")
    read.clear()
    path = write_commit(run_dir, commit(global_step=3), keep=3)
    assert [name for name in read if name in ADAPTERS] == [ADAPTERS[1]]
    monkeypatch.undo()
    assert read_commit(path).position.global_step == 3  # which reads and compares them all


class Killed(BaseException):
    """The process is gone: nothing of its own code catches this."""


def test_killed_at_any_deletion_of_old_commits(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for step in (1, 2):
        write_commit(run_dir, commit(global_step=step), keep=2)
    merged = Commit(commit(global_step=3).position, ADAPTERS[:1], commit(3).parts)  # the other adapter becomes unused
    deletions, killed = 0, True
    while killed:
        copy = tmp_path_factory.mktemp("copy") / "run"
        shutil.copytree(run_dir, copy)
        left = [deletions]
        killed = interrupted(lambda copy=copy: write_commit(copy, merged, keep=1), left)
        deletions += 1

        found, troubles = newest_commit(copy)
        assert found
        assert (equal(found, merged), troubles) == (True, [])
        write_commit(copy, Commit(commit(4).position, ADAPTERS[:1], commit(4).parts), keep=1)
        assert [read_commit(path).position.global_step for path in commits(copy)] == [4]
        assert [entry.name for entry in (copy / "adapters").iterdir()] == list(ADAPTERS[:1])
    assert deletions > 2 * 3 + 2  # two commits of three files each, their folders, and then some


def interrupted(action: Callable[[], object], left: list[int]) -> bool:
    """Whether an action was ended by a kill; `left[0]`: deletions before it."""
    whole = {name: getattr(os, name) for name in ("unlink", "rmdir")}

    def deadly(name: str) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            whole[name](*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in whole:
            patch.setattr(os, name, deadly(name))
        try:
            action()
        except Killed:
            return True
    return False


def test_a_commit_that_fails_leaves_the_others_alone(run_dir: Path) -> None:
    write_commit(run_dir, commit(global_step=1), keep=1)
    bad = Commit(commit().position, ("0009-not-there",), commit().parts)
    with pytest.raises(CheckpointError, match="the commit of step 7 failed"):
        write_commit(run_dir, bad, keep=1)
    found, troubles = newest_commit(run_dir)
    assert found
    assert (found.position.global_step, troubles) == (1, [])
    assert list((run_dir / "checkpoints").glob(".writing-*"))
    remove_scratch(run_dir)
    assert [path.name[0] for path in (run_dir / "checkpoints").iterdir()] == ["0"]
    assert sorted(path.name for path in (run_dir / "adapters").iterdir()) == list(ADAPTERS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["format", "position", "adapters", "files"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    return write_commit(run, Commit(Position(0, 1, False, 1), (), {"adapter": tensors(0)}), keep=1)


@settings(max_examples=200)
@given(changes=st.dictionaries(FIELDS, JSON, min_size=1))
def test_garbage_in_a_manifest(sound: Path, changes: dict[str, Any]) -> None:
    text = (sound / MANIFEST).read_text()
    try:
        edit(sound, lambda manifest: manifest.update(changes))
        try:
            found = read_commit(sound)
        except CheckpointError:
            return
        assert found.position.unit >= 0  # what is accepted can be gone on from
        assert all(isinstance(name, str) and "/" not in name for name in found.adapters)
    finally:
        (sound / MANIFEST).write_text(text)


@given(garbage=st.binary(max_size=200))
def test_garbage_for_a_manifest(sound: Path, garbage: bytes) -> None:
    text = (sound / MANIFEST).read_text()
    try:
        (sound / MANIFEST).write_bytes(garbage)
        with pytest.raises(CheckpointError):
            read_commit(sound)
    finally:
        (sound / MANIFEST).write_text(text)
