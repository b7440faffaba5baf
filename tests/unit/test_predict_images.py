"""`treelora predict` on images: the evaluator's own answers, from files and from bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.image_streams import image_config
from tests.support.streams import execute
from treelora.data.images.files import read_images
from treelora.errors import ConfigError, DataError
from treelora.loop import StreamLoop
from treelora_platform.packing import pack_run
from treelora_platform.predict import PredictOptions, open_predictor, predict_file
from treelora_platform.predict_io import Prompt
from treelora_platform.serving_images import image_prompts

SEEN = [0, 1, 2]


def learnt(folder: Path, **changes: Any) -> tuple[StreamLoop, Path]:
    config = image_config(folder, **changes)
    run_dir = folder / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config.as_yaml())
    loop = execute(config, run_dir)
    (run_dir / "run.json").write_text(json.dumps({"status": "FINISHED"}))
    return loop, run_dir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[StreamLoop, Path]:
    return learnt(tmp_path_factory.mktemp("run"), vision={"align": True, "align_epochs": 1, "align_rows": 8})


def files_of(loop: StreamLoop, folder: Path) -> dict[str, tuple[int, int]]:
    """The test images as files in their own encoding; (task, row) by path."""
    where = {}
    for task, test in enumerate(loop.evaluator.tests):
        encoded = {example.id: example.image for example in read_images(test.task.path("test"))}
        for row, example in enumerate(test.examples):
            path = folder / f"{task}" / f"{row:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded[example.id])
            where[str(path)] = (task, row)
    return where


@pytest.mark.parametrize("mode", ["last", "merged", "routed"])
def test_files_are_answered_as_the_evaluator_does(run: tuple[StreamLoop, Path], mode: str, tmp_path: Path) -> None:
    loop, run_dir = run
    where = files_of(loop, tmp_path / "images")
    loop.evaluator._answers.clear()
    judge = loop.evaluator
    wanted = judge._routed(SEEN, loop.bank, None, None) if mode == "routed" else judge._answer(mode, SEEN, loop.bank)
    out = tmp_path / "answers.jsonl"
    predict_file(run_dir, str(tmp_path / "images"), PredictOptions(inference=mode), out=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == sorted(where)
    assert {where[line["prompt"]]: line["answer"] for line in lines} == wanted
    if mode == "routed":
        names = [test.task.name for test in loop.evaluator.tests]
        taken = {where[line["prompt"]]: names.index(line["task"]) for line in lines}
        for task in SEEN:
            best = loop.evaluator._routes(task).best_n.tolist()
            assert [taken[task, row] for row in range(len(best))] == best


def test_a_packed_run_answers_from_bytes(run: tuple[StreamLoop, Path], tmp_path: Path) -> None:
    loop, run_dir = run
    where = files_of(loop, tmp_path / "images")
    packed = pack_run(run_dir, tmp_path / "packed")
    prompts = [Prompt(f"row {i}", i, "", image=Path(path).read_bytes()) for i, path in enumerate(sorted(where))]
    own = open_predictor(run_dir, PredictOptions())
    other = open_predictor(packed, PredictOptions())
    answers = [[a.answer for part in p.answers(prompts) for a in part] for p in (own, other)]
    assert answers[0] == answers[1]
    assert set(answers[0]) <= set("456789")


@pytest.mark.parametrize("method", ["ncm", "l2p", "dualprompt", "olora"])
def test_other_methods_answer_too(method: str, tmp_path: Path) -> None:
    section = {"dualprompt": {"layers": [1], "general_layers": [0]}}.get(method, {})
    loop, run_dir = learnt(
        tmp_path, method=method, evaluation={"modes": ["last"]}, **({method: section} if section else {})
    )
    where = files_of(loop, tmp_path / "images")
    wanted = loop.evaluator._answer("last", SEEN, loop.bank)
    predictor = open_predictor(pack_run(run_dir, tmp_path / "packed"), PredictOptions())
    prompts = image_prompts(str(tmp_path / "images"))
    found = {where[a.prompt]: a.answer for part in predictor.answers(prompts) for a in part}
    assert found == wanted


def test_what_is_no_image_is_refused_by_name(run: tuple[StreamLoop, Path], tmp_path: Path) -> None:
    _, run_dir = run
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad.png: image can't be decoded"):
        predict_file(run_dir, str(tmp_path / "bad.png"), PredictOptions(), out=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image file is there"):
        image_prompts(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="learnt images; --format and --choices are for prompts"):
        predict_file(run_dir, str(tmp_path), PredictOptions(choices=("4", "5")))


def test_larger_files_are_fitted(run: tuple[StreamLoop, Path], tmp_path: Path) -> None:
    _, run_dir = run
    Image.effect_noise((40, 60), 50).convert("RGB").save(tmp_path / "noise.jpg")
    predictor = open_predictor(run_dir, PredictOptions(task="classes 6 and 7"))
    [[answer]] = predictor.answers(image_prompts(str(tmp_path / "noise.jpg")))
    assert answer.task == "classes 6 and 7"
    assert answer.answer in "456789"
