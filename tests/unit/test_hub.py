"""Data sets and models by their Hugging Face ids, from a hub on this machine, as the libraries ask a real one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.hub import COMMIT, hub
from tests.support.images import encoded, noise
from treelora.data import open_task
from treelora.data.images import decode, read_images
from treelora.models.tiny import tiny_image_model, tiny_model, tiny_tokenizer

Asking = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Asking:
    """Run a Python module or program with that hub and a cache of its own."""
    pytest.importorskip("datasets", reason="needs treelora[data]")
    root = tmp_path_factory.mktemp("hub")
    class_label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    for split, rows in (("train", 6), ("test", 4)):
        images = [{"bytes": encoded(noise(i, 8, 8)), "path": f"{i}.png"} for i in range(rows)]
        repository(root / "me/pets", split, {"image": images, "label": [i % 2 for i in range(rows)]}, class_label)
        words = [f"is {i} odd?" for i in range(rows)]
        repository(root / "me/words", split, {"text": words, "label": [i % 2 for i in range(rows)]}, class_label)
    tiny_image_model(0, 3).save_pretrained(root / "me/vit")
    tiny_model(0).save_pretrained(root / "me/llama")
    tiny_tokenizer().save_pretrained(root / "me/llama")

    def ask(*command: str, endpoint: str | None = None) -> subprocess.CompletedProcess[str]:
        with hub(root) as address:
            env = os.environ | {
                "HF_ENDPOINT": endpoint or address,
                "HF_HOME": str(root / ".cache"),
                "HF_HUB_OFFLINE": "0",
                "COLUMNS": "200",
            }
            return subprocess.run(
                [sys.executable, *command], env=env, capture_output=True, text=True, timeout=120, check=False
            )

    return ask


def repository(folder: Path, split: str, columns: dict[str, list[object]], label: dict[str, object]) -> None:
    """A split of a data set as the hub exports it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    kinds = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}, "label": label}
    features = {"info": {"features": {name: kinds[name] for name in columns}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, folder / f"data/{split}-00000-of-00001.parquet")


def imported(asking: Asking, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    return asking("-m", "treelora_platform", "data", "import", *arguments, **options)


def test_images_by_id(asking: Asking, tmp_path: Path) -> None:
    done = imported(
        asking, "hf_images", "me/pets", str(tmp_path), "--option", f"revision={COMMIT}", "--option", "tasks=1"
    )
    assert done.returncode == 0, done.stderr
    task = open_task(tmp_path / "classes-cat-and-dog")
    rows = list(read_images(task.path("train")))
    assert [row.label for row in rows] == ["cat", "dog"] * 3
    for i, row in enumerate(rows):
        assert np.array_equal(np.asarray(decode(row.image)), noise(i, 8, 8))


def test_text_by_id(asking: Asking, tmp_path: Path) -> None:
    done = imported(asking, "hf", "me/words", str(tmp_path), "--option", "columns={prompt: text, answer: label}")
    assert done.returncode == 0, done.stderr
    task = open_task(tmp_path / "words")
    assert task.choices == ("cat", "dog")
    assert [(row.prompt, row.answer) for row in task.read("test")][:2] == [("is 0 odd?", "cat"), ("is 1 odd?", "dog")]


@pytest.mark.parametrize("source", ["hf", "hf_images"])
def test_what_is_not_there_is_refused_in_one_line(asking: Asking, tmp_path: Path, source: str) -> None:
    done = imported(asking, source, "me/nothing", str(tmp_path))
    assert done.returncode == 2
    assert "me/nothing: can't be loaded as a Hugging Face data set" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


MODELS = """
from treelora.models.causal import load_model, load_tokenizer
from treelora.models.spec import ModelSpec
from treelora.models.vision import load_image_model
vit = load_image_model(ModelSpec(name="me/vit", dtype="float32"), 5)
print(vit.classifier.out_features, vit.vit.layers[0].attention.q_proj.weight.double().sum().item())
llama = ModelSpec(name="me/llama", dtype="float32")
print(load_model(llama).lm_head.weight.double().sum().item(), load_tokenizer("me/llama")("a b").input_ids)
"""


def test_models_by_id(asking: Asking) -> None:
    done = asking("-c", MODELS)
    assert done.returncode == 0, done.stderr
    vit, llama = tiny_image_model(0, 3), tiny_model(0)
    assert done.stdout.splitlines()[-2:] == [
        f"5 {vit.vit.layers[0].attention.q_proj.weight.double().sum().item()}",
        f"{llama.lm_head.weight.double().sum().item()} {tiny_tokenizer()('a b').input_ids}",
    ]
