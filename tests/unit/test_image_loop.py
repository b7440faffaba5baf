"""A stream of images through the loop: against training by hand, heads that keep, resumption to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity
from torch.nn import functional as F

from tests.support.image_streams import PAIRS, STEPS, image_config
from tests.support.prompted_streams import prompted_config
from tests.support.streams import build_loop, build_run, commits, digests, execute, outcome, recorded
from treelora.data import sources
from treelora.engine import read_adapter, read_head
from treelora.loop import StreamLoop
from treelora.schedule import learning_rate
from treelora_platform.assemble import load_adapted_model
from treelora_platform.prepare import prepare_stream

WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"


def run(folder: Path, **changes: Any) -> StreamLoop:
    loop = build_loop(image_config(folder, **changes))
    loop.run()
    return loop


def test_sequential_is_plain_fine_tuning_with_local_cross_entropy(tmp_path: Path) -> None:
    config = image_config(tmp_path, method="sequential", lora={"dropout": 0.0})
    loop = build_loop(config)
    loop.run()
    assert [unit.name for unit in loop.units] == ["classes 4 and 5", "classes 6 and 7", "classes 8 and 9"]

    model: Any = load_adapted_model(config, 3, classes=6)
    weights = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for task, unit in enumerate(loop.units):
        optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
        split = unit.splits[0]
        for step in range(1, STEPS + 1):
            total = torch.zeros(())
            for row in unit.plan.rows(step - 1):
                pixels, place, owner = split.rows.item(int(split.chosen[row]))
                assert owner == task
                assert pixels.shape == (8, 8, 3)
                x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
                logits = model(pixel_values=x).logits[:, 2 * task : 2 * task + 2]
                total = total + F.cross_entropy(logits, torch.tensor([place - 2 * task]))
            (total / 4).backward()
            torch.nn.utils.clip_grad_norm_(weights, config.train.clip)
            optimizer.param_groups[0]["lr"] = learning_rate(
                step, STEPS, config.train.learning_rate, config.train.warmup, config.train.min_lr
            )
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item() / 4)
    assert [record.loss for record in recorded(loop).steps] == pytest.approx(losses, rel=1e-4)
    trained = read_adapter(loop.engine) | read_head(loop.engine)
    for own, name in zip(weights, trained, strict=True):
        torch.testing.assert_close(trained[name], own.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("mask", "kept"), [("local", True), ("seen", False)])
def test_the_head_grows(mask: str, kept: bool, tmp_path: Path) -> None:
    """Rows for classes to come are as they began; a local mask leaves those of past tasks as they were learnt."""
    loop, heads = build_loop(image_config(tmp_path, method="sequential", vision={"mask": mask})), []
    fresh = read_head(loop.engine)
    keep = loop.hooks.commit

    def commit(position: Any, own: StreamLoop) -> None:
        keep(position, own)
        if position.trained:
            heads.append(read_head(own.engine))

    loop.hooks.commit = commit  # type: ignore[method-assign]
    loop.run()
    for task, head in enumerate(heads):
        assert torch.equal(head[WEIGHT][2 * task + 2 :], fresh[WEIGHT][2 * task + 2 :])
        assert torch.equal(head[BIAS][2 * task + 2 :], fresh[BIAS][2 * task + 2 :])
        assert not torch.equal(head[WEIGHT][2 * task : 2 * task + 2], fresh[WEIGHT][2 * task : 2 * task + 2])
    assert torch.equal(heads[0][WEIGHT][:2], heads[2][WEIGHT][:2]) is kept
    assert torch.equal(heads[1][BIAS][2:4], heads[2][BIAS][2:4]) is kept


@pytest.mark.parametrize("protocol", ["class_incremental", "task_incremental"])
def test_answers_are_the_likeliest_of_what_may_be(protocol: str, tmp_path: Path) -> None:
    loop = run(tmp_path, method="sequential", stream={"classes": {"per_task": 2, "protocol": protocol}, "order": []})
    names = loop.evaluator.reader.classes.names  # type: ignore[attr-defined]
    assert names == tuple("0123456789")
    found = outcome(recorded(loop).scores)
    assert len(recorded(loop).tasks) == 5
    for task, test in enumerate(loop.evaluator.tests):
        rows = [test.rows.item(int(i)) for i in test.chosen]
        x = torch.stack([torch.from_numpy(p.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1 for p, _, _ in rows])
        loop.engine.module.eval()
        with torch.no_grad():
            logits = loop.engine.module(pixel_values=x).logits
        told = protocol == "task_incremental"
        best = logits[:, 2 * task : 2 * task + 2].argmax(1) + 2 * task if told else logits.argmax(1)
        truth = torch.tensor([place for _, place, _ in rows])
        assert found["last", task, 4] == pytest.approx(100 * float((best == truth).float().mean()))


def test_classes_to_come_are_never_answered(tmp_path: Path) -> None:
    loop = build_loop(image_config(tmp_path, method="sequential"))
    head = read_head(loop.engine)
    loop.engine.write_adapter({BIAS: torch.tensor([0.0, 0, 0, 0, 50, 50])})  # the last task's classes would always win
    reader: Any = loop.evaluator.reader
    rows = [(0, row) for row in range(10)]
    for seen, allowed in (([0], set("45")), ([0, 1], set("4567"))):
        assert set(reader.answers("image", rows, seen)) <= allowed
    assert set(reader.answers("image", rows, [0, 1, 2])) <= set("89")
    loop.engine.write_adapter(head)


def test_nearest_class_means(tmp_path: Path) -> None:
    loop = run(tmp_path, method="ncm")
    found = outcome(recorded(loop).scores)
    assert {mode for mode, _, _ in found} == {"last"}
    assert len(loop.units) == 3
    assert recorded(loop).steps == []
    reader: Any = loop.evaluator.reader
    places = [range(len(unit.splits[0])) for unit in loop.units]
    trained = [reader.features(unit.splits[0], p).numpy() for unit, p in zip(loop.units, places, strict=True)]
    means = []
    for unit, features in zip(loop.units, trained, strict=True):
        directions = features / np.linalg.norm(features, axis=1, keepdims=True)
        classes = unit.splits[0].rows.classes[unit.splits[0].chosen]
        means += [directions[classes == place].mean(axis=0) for place in np.unique(classes)]
    for after in range(3):
        for task in range(after + 1):
            test = loop.evaluator.tests[task]
            near = cosine_similarity(reader.features(test, range(10)).numpy(), np.stack(means[: 2 * after + 2]))
            expected = 100 * np.mean(near.argmax(axis=1) == test.rows.classes[test.chosen])
            assert found["last", task, after] == pytest.approx(expected)


VARIANTS: dict[str, dict[str, Any]] = {
    "treelora aligned": {"vision": {"align": True, "align_epochs": 2, "align_rows": 8}},
    "treelora protected": {"treelora": {"protect": 0.9}},
    "treelora unguarded": {"treelora": {"guard": None}},
    "augmented": {"method": "sequential", "vision": {"crop_area": 0.5, "flip": True}},
    "ncm": {"method": "ncm"},
    "replay seen": {"method": "replay", "vision": {"mask": "seen"}, "replay": {"share": 0.5}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_at_every_commit_it_ends_the_same(name: str, tmp_path: Path) -> None:
    config = image_config(tmp_path, **VARIANTS[name])
    whole = execute(config, tmp_path / "whole")
    every = commits(tmp_path / "whole")
    expected = digests(every[-1])
    for number in range(0, len(every) - 1, 4):
        cut = tmp_path / f"cut-{number}"
        shutil.copytree(tmp_path / "whole", cut)
        for later in every[number + 1 :]:
            shutil.rmtree(cut / "checkpoints" / later.name)
        resumed = execute(config, cut)
        assert digests(commits(cut)[-1]) == expected
        assert resumed.position == whole.position or resumed.position.unit == whole.position.unit


@pytest.mark.parametrize("method", ["treelora", "inflora", "sdlora", "l2p", "dualprompt"])
def test_more_classes_come_later(tmp_path: Path, method: str) -> None:
    """The head gets rows for what an extension brings, and keeps what it had."""
    first = {"classes": {"per_task": 2, "base": ["0", "1", "2", "3"]}, "order": ["classes 4 and 5", "classes 6 and 7"]}
    later = {"source": "digits", "classes": {"per_task": 2, "base": ["0", "1", "2", "3"]}, "order": ["classes 8 and 9"]}
    config = prompted_config(tmp_path, stream=first, method=method)
    before = read_head(execute(config, tmp_path / "run").engine)
    [weight] = [name for name in before if name.endswith(".weight")]
    extended = config.model_copy(update={"extensions": (type(config.stream)(**later, train_rows=24, test_rows=10),)})
    loop, _ = build_run(extended, tmp_path / "run")
    grown = read_head(loop.engine)
    assert before[weight].shape == (4, 32)
    assert grown[weight].shape == (6, 32)
    assert torch.equal(grown[weight][:4], before[weight])
    assert loop.position.unit == 2
    loop.run()
    assert torch.equal(read_head(loop.engine)[weight][:4], before[weight])
    assert len(loop.bank) == 3
    assert [tuple(test.task.choices) for test in loop.evaluator.tests] == list(PAIRS)


def test_domains_share_their_classes(tmp_path: Path) -> None:
    """Tasks are a domain each, the head has every class once, and no class is masked."""
    for domain, sign in (("ink", 1), ("negative", -1)):
        for split, count in (("train", 6), ("test", 2)):
            for label in ("a", "b"):
                folder = tmp_path / "images" / domain / split / label
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = np.random.default_rng([number, len(domain), ord(label)]).integers(0, 100, (8, 8))
                    Image.fromarray((128 + sign * pixels).astype(np.uint8)).save(folder / f"{number}.png")
    stream = {"source": "image_folder", "path": str(tmp_path / "images"), "classes": {"protocol": "domain_incremental"}}
    options = {"options": {"layout": "domain/split/class"}}
    loop = run(tmp_path / "runs", method="sequential", stream=stream | options)
    assert [unit.name for unit in loop.units] == ["ink", "negative"]
    assert read_head(loop.engine)[WEIGHT].shape == (2, 32)
    batch = loop.units[1].batch(range(2), torch.device("cpu"))
    assert bool(batch["candidates"].all())  # type: ignore[typeddict-item]
    assert {key[1:] for key in outcome(recorded(loop).scores)} == {(0, 0), (0, 1), (1, 1)}


def test_tokens_are_patches(tmp_path: Path) -> None:
    loop = build_loop(image_config(tmp_path))
    assert loop.units[0].tokens(0) == 4 * 16  # four images of 8 x 8 pixels in patches of 2 x 2
    assert loop.units[0].normaliser(0, 2) == 2.0


def test_images_are_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a file of the source changes."""
    for label, count in (("a", 4), ("b", 4)):
        for split in ("train", "test"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), number * 40 + ord(label)).save(folder / f"{number}.png")
    (tmp_path / "images" / "train" / "a" / "bad.png").write_bytes(b"no image")
    imports: list[str] = []
    real = sources.import_tasks

    def counted(*args: Any, **options: Any) -> Any:
        imports.append(args[0])
        return real(*args, **options)

    monkeypatch.setattr(sources, "import_tasks", counted)
    stream = {"source": "image_folder", "path": str(tmp_path / "images"), "classes": {"tasks": 1}}
    config = image_config(tmp_path / "runs", stream=stream)
    first, second = prepare_stream(config), prepare_stream(config)
    assert imports == ["image_folder"]
    assert first.fingerprint() == second.fingerprint()
    assert first.skipped == second.skipped == {"classes a and b": {"image can't be decoded": 1}}
    (tmp_path / "images" / "train" / "a" / "bad.png").unlink()
    third = prepare_stream(config)
    assert imports == ["image_folder"] * 2
    assert third.skipped == {}
    next((tmp_path / "runs" / ".cache" / "tasks").rglob("test.parquet")).unlink()
    assert prepare_stream(config).fingerprint() == third.fingerprint()
    assert imports == ["image_folder"] * 3
