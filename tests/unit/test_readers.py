"""Every reader of files answers whatever it is given with a result or with our own error: never a traceback, no hang.

Each reader gets a sound folder first, which it must read, and then hundreds of copies that were harmed: bytes cut off,
overwritten, inserted, values of JSON files replaced by others of any type, files gone, folders in their place.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from tests.support.images import class_folders, encoded, examples, meta, noise, put
from tests.support.mutations import HARMS, VALUES, Harm, within
from tests.support.run_dir import finished_run
from treelora.adapters import load_adapter
from treelora.data import import_tasks, open_task
from treelora.data.images.files import read_images, write_images
from treelora.data.images.pixels import ImageRows, pixel_rows
from treelora.data.parquet import write_split
from treelora.data.schema import Example, SplitMeta
from treelora.data.sources import IMPORTERS
from treelora.errors import TreeLoRAError
from treelora.loop_records import Position
from treelora.tree import SignatureTree
from treelora_platform.checkpoint import Commit, newest_commit, write_commit
from treelora_platform.config import load_config
from treelora_platform.predict_io import read_prompts
from treelora_platform.run_tables import (
    read_config_yaml,
    read_run_json,
    read_scores,
    read_steps,
    read_tasks,
    read_trees,
    task_names,
)
from treelora_platform.show import show_run
from treelora_platform.studies.run import Entry, Log
from treelora_platform.sweep.journal import Entry as Trial
from treelora_platform.sweep.journal import Journal
from treelora_platform.sweep.spec import load_sweep, template

SECONDS = 30
"""What no reader of these few kilobytes needs; a hang is what takes longer."""
EXAMPLES = int(os.environ.get("TREELORA_FUZZ_EXAMPLES", "60"))
"""Of each reader; thousands find what is rare."""
FORGIVING = {"prompts"}
"""Refused one file after the other: what is refused on the way isn't counted."""


def dump(path: Path, value: object) -> None:
    put(path, json.dumps(value).encode())


def lines(path: Path, values: list[Any]) -> None:
    put(path, b"".join(json.dumps(value).encode() + b"\n" for value in values))


# What makes a sound folder for each reader, and what reads it.


def olora(folder: Path) -> None:
    dump(folder / "NLI/toy/labels.json", ["yes", "no"])
    rows = [{"sentence": f"text {i}", "label": ("yes", "no")[i % 2]} for i in range(3)]
    for split in ("train", "test"):
        dump(folder / f"NLI/toy/{split}.json", rows)


def trace(folder: Path) -> None:
    for split in ("train", "eval", "test"):
        dump(folder / f"FOMC/{split}.json", [{"prompt": f"what {i}", "answer": "ABC"[i]} for i in range(3)])


ROWS = [{"prompt": f"p {i}", "answer": "yes" if i % 2 else "no", "choices": ["yes", "no"]} for i in range(4)]


def jsonl(folder: Path) -> None:
    for split in ("train", "test"):
        lines(folder / f"{split}.jsonl", ROWS)


def csv(folder: Path) -> None:
    for split in ("train", "test"):
        put(folder / f"{split}.csv", b"prompt,answer,choices\n" + b"p 1,yes,yes|no\n" * 3)


def parquet(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(ROWS), folder / f"{split}.parquet")


def text_task(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = [Example(f"r{i}", f"prompt {i}", ("yes", "no")[i % 2], ("yes", "no")) for i in range(3)]
    for split in ("train", "test"):
        meta_ = SplitMeta(
            name="toy", kind="choice", choices=("yes", "no"), metric="accuracy", split=split, source="t", skipped={}
        )
        write_split(folder / f"{split}.parquet", rows, meta_)


def image_task(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, start in (("train", 0), ("test", 4)):
        write_images(folder / f"{split}.parquet", examples(4, start), meta(split))


def image_folder(folder: Path) -> None:
    class_folders(folder, {f"{split}/{label}": 2 for split in ("train", "test") for label in "ab"})


def labelled_images(folder: Path) -> None:
    for i in range(4):
        put(folder / f"{i}.png", encoded(noise(i)))
    dump(folder / "labels.json", {f"{i}.png": "ab"[i % 2] for i in range(4)})


def imagenet_r(folder: Path) -> None:
    class_folders(folder, {f"n0000000{i}": 3 for i in range(2)})


def cub200(folder: Path) -> None:
    names = [f"{label}/{i}.png" for label in ("001.A", "002.B") for i in range(3)]
    for i, name in enumerate(names):
        put(folder / "images" / name, encoded(noise(i)))
    for file, texts in {
        "images": names,
        "classes": ["001.A", "002.B"],
        "image_class_labels": ["1", "1", "1", "2", "2", "2"],
        "train_test_split": ["1", "0", "1", "1", "0", "1"],
    }.items():
        put(folder / f"{file}.txt", "\n".join(f"{i} {text}" for i, text in enumerate(texts, 1)).encode())


def cifar100(folder: Path) -> None:
    put(folder / "fine_label_names.txt", b"cat\ndog\n")
    for split in ("train", "test"):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
        put(folder / f"{split}.bin", b"".join(bytes([0, i % 2]) + row.tobytes() for i, row in enumerate(pixels)))


def image_tables(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"image": {"bytes": encoded(noise(i))}, "label": "ab"[i % 2]} for i in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


def saved_data_set(folder: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs treelora[data]")
    table = datasets.Dataset.from_list([{"prompt": f"p {i}", "answer": "yes"} for i in range(3)])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder)


def importing(source: str, **options: Any) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        out = folder.with_name("imported")
        shutil.rmtree(out, ignore_errors=True)
        return import_tasks(source, str(folder), None, out, options=options)

    return read


def settings_file(folder: Path) -> None:
    put(folder / "my.yaml", b"{name: toy, stream: {source: builtin}, train: {steps: 3}, lora: {rank: 4}}")


def sweep_file(folder: Path) -> None:
    plain = {"name": "toy", "recipe": "demo", "space": {"lora.rank": [2, 4]}, "overrides": {"seed": 1}}
    dump(folder / "my.yaml", plain | {"search": "grid"})


def commits(folder: Path) -> None:
    put(folder / "adapters/0001-toy/adapter_model.safetensors", b"some bytes")
    for step in (1, 2):
        part = {"adapter": {"a": torch.ones(2)}, "loop": {"b": torch.zeros(1)}}
        write_commit(folder, Commit(Position(0, step, False, step), ("0001-toy",), part), keep=2)


def whole_run(folder: Path) -> None:
    finished_run(folder)


def read_whole_run(folder: Path) -> None:
    for read in (read_steps, read_scores, read_tasks, task_names, read_trees, read_run_json, read_config_yaml):
        with suppress(TreeLoRAError):
            read(folder)
    show_run(folder, Console(file=StringIO(), width=80))


def prompts(folder: Path) -> None:
    lines(folder / "a.jsonl", [{"prompt": f"p {i}", "choices": ["x", "y"], "id": i} for i in range(3)])
    put(folder / "b.txt", b"one\ntwo\n")
    text_task(folder / "c")


def read_all_prompts(folder: Path) -> None:
    for name in ("a.jsonl", "b.txt", "c/test.parquet"):
        with suppress(TreeLoRAError):
            read_prompts(str(folder / name))


def tree(folder: Path) -> None:
    signatures = np.random.default_rng(0).normal(size=(4, 2, 3))
    put(folder / "tree.json", SignatureTree.build(signatures).to_json().encode())


def read_tree(folder: Path) -> object:
    path = folder / "tree.json"
    return SignatureTree.from_json(path.read_bytes().decode("utf-8", "replace") if path.is_file() else "")


def pixels(folder: Path) -> None:
    image_task(folder / "task")
    pixel_rows(open_task(folder / "task"), "train", 4, folder / "cache")


def read_pixels(folder: Path) -> object:
    for path in (folder / "cache").iterdir():
        with suppress(TreeLoRAError):
            ImageRows.open(path)
    return pixel_rows(open_task(folder / "task"), "train", 4, folder / "cache")


def adapter(folder: Path) -> None:
    folder.mkdir()
    save_file({"a": torch.ones(3)}, folder / "adapter_model.safetensors")


def journals(folder: Path) -> None:
    folder.mkdir()
    Journal(folder / "trials.jsonl").add(Trial("run-1", {"lora.rank": 4}, "done", 3, {"op": 50.0}))
    Log(folder / "study.jsonl").add(Entry("run-1", "a", 24, "done", 1.5, "", 2.0))


def read_journals(folder: Path) -> None:
    with suppress(TreeLoRAError):
        Journal(folder / "trials.jsonl").latest()
    for entry in Log(folder / "study.jsonl").entries():
        assert entry.seconds + entry.time >= entry.seconds - 1  # numbers are numbers


READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "olora": (olora, importing("olora")),
    "trace": (trace, importing("trace")),
    "jsonl": (jsonl, importing("jsonl")),
    "csv": (csv, importing("csv")),
    "parquet": (parquet, importing("parquet")),
    "hf": (saved_data_set, importing("hf")),
    "own text task": (text_task, lambda folder: open_task(folder).read("train")),
    "image_folder": (image_folder, importing("image_folder", classes_per_task=2)),
    "image_folder with labels": (labelled_images, importing("image_folder", labels="labels.json", classes_per_task=2)),
    "imagenet_r": (imagenet_r, importing("imagenet_r", classes_per_task=2)),
    "cub200": (cub200, importing("cub200", classes_per_task=2)),
    "cifar100": (cifar100, importing("cifar100", classes_per_task=2)),
    "images": (image_tables, importing("images", classes_per_task=2)),
    "own image task": (image_task, lambda folder: list(read_images(open_task(folder).path("train")))),
    "decoded images": (pixels, read_pixels),
    "configuration": (settings_file, lambda folder: load_config(folder / "my.yaml")),
    "sweep": (sweep_file, lambda folder: template(load_sweep(folder / "my.yaml"))),
    "commits": (commits, newest_commit),
    "run folder": (whole_run, read_whole_run),
    "prompts": (prompts, read_all_prompts),
    "tree": (tree, read_tree),
    "adapter": (adapter, load_adapter),
    "journals": (journals, read_journals),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sound folder for a reader, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("sound") / "folder"
            READERS[name][0](made[name])
        return made[name]

    return get


def answer(read: Callable[[Path], object], folder: Path) -> str:
    try:
        read(folder)
    except TreeLoRAError as error:
        refusal = str(error)
    else:
        return "read"
    first, *others = refusal.splitlines()
    assert first.strip()
    assert all(line.startswith("  ") for line in others), f"more than a line, and no list: {refusal}"
    return "refused"


@pytest.mark.parametrize("name", READERS)
def test_what_is_sound_is_read(sound: Callable[[str], Path], name: str) -> None:
    READERS[name][1](sound(name))


@pytest.mark.parametrize("name", READERS)
def test_whatever_is_given(sound: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    whole, read = sound(name), READERS[name][1]

    @settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(HARMS)
    def harmed(harms: list[Harm]) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as scratch:
            folder = Path(shutil.copytree(whole, Path(scratch) / "folder"))
            for harm in harms:
                harm.do(folder)
            with within(SECONDS, lambda: f"{name} after {harms}"):
                answer(read, folder)

    harmed()


@pytest.mark.parametrize("name", [name for name in READERS if name not in FORGIVING])
def test_what_is_nothing_but_zeros_is_refused(sound: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(sound(name), tmp_path / "folder"))
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0\n" * 20)  # lines, for a journal forgives a torn last one
    assert answer(READERS[name][1], folder) == "refused"


@pytest.mark.parametrize("source", [name for name in IMPORTERS if name != "digits"])
def test_whatever_options_are_given(tmp_path_factory: pytest.TempPathFactory, source: str) -> None:
    known = sorted(IMPORTERS[source].options | {"splits", "limit"})
    root = tmp_path_factory.mktemp("options")
    READERS[source.replace("hf_images", "hf")][0](root / "in")

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.dictionaries(st.sampled_from([*known, "zz"]), VALUES, max_size=3))
    @example({"config": "\r"})  # a name of more than a line
    def given_(options: dict[str, Any]) -> None:
        with within(SECONDS, lambda: f"{source} with {options}"):
            answer(importing(source, **options), root / "in")

    given_()
