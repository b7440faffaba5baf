"""`treelora predict` against the evaluator: the same rows get the same answers, in every mode."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import SEEN, expected, file_of, learnt, predicted, texts
from tests.support.streams import ONE_TASK_MIB, TASKS, tiny_config
from treelora.data.files import join
from treelora.data.parquet import write_split
from treelora.data.schema import Example, SplitMeta
from treelora.loop import StreamLoop
from treelora_platform import serving
from treelora_platform.config import parse_config
from treelora_platform.predict import PredictOptions, open_predictor
from treelora_platform.predict_io import Prompt, read_prompts

MODES = ("last", "merged", "routed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StreamLoop]:
    folder = tmp_path_factory.mktemp("predict")
    # without a guard tasks' adapters differ by what they answer
    config = tiny_config(
        folder, lora={"alpha": 64}, train={"steps": 12, "learning_rate": 0.05}, treelora={"guard": None}
    )
    return folder / "run", learnt(config, folder / "run")


def test_the_evaluators_answers_in_every_mode(run: tuple[Path, StreamLoop]) -> None:
    run_dir, loop = run
    wanted = {mode: expected(loop, mode) for mode in MODES}
    for mode in MODES:
        assert texts(predicted(open_predictor(run_dir, PredictOptions(mode)), loop)) == wanted[mode], mode
    assert len({tuple(answers.items()) for answers in wanted.values()}) == 3  # the modes differ, so they can be told


def test_what_is_said_of_the_route(run: tuple[Path, StreamLoop]) -> None:
    run_dir, loop = run
    answers = predicted(open_predictor(run_dir, PredictOptions("routed")), loop)
    for task in SEEN:
        routes = loop.evaluator._routes(task)
        for row in range(len(loop.evaluator.tests[task])):
            answer = answers[task, row]
            assert (answer.task, answer.runner_up) == (TASKS[routes.best_n[row]], TASKS[routes.second_n[row]])
            assert answer.margin == pytest.approx(routes.margin_n[row], rel=1e-3, abs=1e-3)
            assert (answer.fallback, answer.ms > 0) == (False, True)
    plain = predicted(open_predictor(run_dir, PredictOptions("last")), loop, [0])
    assert {(a.task, a.margin, a.runner_up, a.fallback) for a in plain.values()} == {(None, None, None, False)}


def test_rounds_and_batches_change_nothing(run: tuple[Path, StreamLoop], monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, loop = run
    monkeypatch.setattr(serving, "ROUND", 1)
    predictor = open_predictor(run_dir, PredictOptions("routed", batch_rows=2))
    parts = list(predictor.answers(read_prompts(file_of(loop.evaluator.tests[0].task))))
    assert [len(part) for part in parts] == [2, 2, 2]
    assert texts(predicted(predictor, loop)) == expected(loop, "routed")


def test_each_adapter_is_written_once_a_round(run: tuple[Path, StreamLoop], monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, loop = run
    predictor = open_predictor(run_dir, PredictOptions("routed"))
    prompts = [prompt for test in loop.evaluator.tests for prompt in read_prompts(file_of(test.task))]
    written: list[Any] = []
    write = predictor.engine.write_adapter
    monkeypatch.setattr(predictor.engine, "write_adapter", lambda state: (written.append(state), write(state)))
    [answers] = predictor.answers(prompts)
    assert len(written) == len({answer.task for answer in answers}) > 1


def test_a_forced_task_answers_with_its_adapter(run: tuple[Path, StreamLoop]) -> None:
    run_dir, loop = run
    everything = [(task, row) for task in SEEN for row in range(len(loop.evaluator.tests[task]))]
    different = set()
    for k, name in enumerate(TASKS):
        answers = predicted(open_predictor(run_dir, PredictOptions(task=name)), loop)
        wanted = loop.evaluator._with_adapter(f"task {k}", lambda k=k: loop.bank[k], everything, SEEN)
        assert texts(answers) == wanted
        assert {(a.task, a.margin, a.runner_up) for a in answers.values()} == {(name, None, None)}
        different.add(tuple(wanted.values()))
    assert len(different) == 3


@pytest.mark.parametrize("budget", [None, ONE_TASK_MIB])
def test_unsure_prompts_are_answered_by_the_average(budget: float | None, tmp_path: Path) -> None:
    train = {"steps": 12, "learning_rate": 0.05}
    options = {"budget_mib": budget, "guard": None}
    config = tiny_config(tmp_path, evaluation={"router_margin": 1e9}, treelora=options, train=train)
    loop = learnt(config, tmp_path / "run")
    sure = predicted(open_predictor(tmp_path / "run", PredictOptions("routed", router_margin=0.0)), loop)
    unsure = predicted(open_predictor(tmp_path / "run", PredictOptions("routed")), loop)
    assert texts(unsure) == expected(loop, "routed")
    assert {answer.fallback for answer in unsure.values()} == {True}
    assert {answer.fallback for answer in sure.values()} == {False}
    assert (len({id(state) for state in loop.bank}) < 3) == (budget is not None)
    assert [a.task for a in sure.values()] == [a.task for a in unsure.values()]


def test_defaults_follow_the_run(run: tuple[Path, StreamLoop], tmp_path: Path) -> None:
    run_dir, _ = run
    again = tmp_path / "run"
    shutil.copytree(run_dir, again)
    assert open_predictor(again, PredictOptions()).inference == "last"  # treelora.inference
    plain = tiny_config(tmp_path).as_dict()
    for changes, mode in (({"treelora": {"inference": "merged"}}, "merged"), ({"method": "sequential"}, "routed")):
        config = parse_config(plain | changes)
        (again / "config.yaml").write_text(config.as_yaml())
        assert open_predictor(again, PredictOptions()).inference == mode


@pytest.mark.parametrize("method", ["olora", "sdlora"])
def test_an_accumulating_method_and_one_more_task(method: str, tmp_path: Path) -> None:
    """The model gets the rank that the commit has: of two tasks, and of three once the run was extended."""
    plain = tiny_config(tmp_path, method=method, lora={"dropout": 0.0}).as_dict()
    first = parse_config(plain | {"stream": plain["stream"] | {"order": TASKS[:2]}})
    run_dir = tmp_path / "run"
    learnt(first, run_dir)
    two = open_predictor(run_dir, PredictOptions("routed"))
    extension = plain["stream"] | {"order": TASKS[2:]}
    longer = parse_config(first.as_dict() | {"extensions": [extension]})
    (run_dir / "config.yaml").write_text(longer.as_yaml())  # as `treelora extend` does before it trains
    early = open_predictor(run_dir, PredictOptions("routed"))
    loop = learnt(longer, run_dir)
    three = open_predictor(run_dir, PredictOptions("routed"))
    ranks = [next(iter(p.engine.adapter_tensors().values())).shape[0] for p in (two, early, three)]
    assert ranks == [4, 4, 6]
    assert [p.learnt.names for p in (two, early, three)] == [TASKS[:2], TASKS[:2], TASKS]
    assert texts(predicted(three, loop)) == expected(loop, "routed")


def test_a_text_prompt_gets_the_choices_of_the_task_it_is_taken_for(run: tuple[Path, StreamLoop]) -> None:
    run_dir, loop = run
    prompts = [Prompt("x", 1, read_prompts(file_of(test.task))[0].text) for test in loop.evaluator.tests]
    colours, directions = (loop.evaluator.tests[k].task.choices for k in (0, 1))
    own = {TASKS[0]: colours, TASKS[1]: directions, TASKS[2]: colours}
    assert len({*colours, *directions}) == 4

    def ask(**options: Any) -> list[Any]:
        return [a for part in open_predictor(run_dir, PredictOptions(**options)).answers(prompts) for a in part]

    routed = ask(inference="routed")
    assert all(answer.answer in own[answer.task] for answer in routed)
    assert all(answer.answer in directions for answer in ask(task=TASKS[1]))
    assert all(answer.answer in ("yes", "no") for answer in ask(inference="routed", choices=("yes", "no")))
    for free in (ask(inference="last"), ask(inference="routed", choices=()), ask(inference="merged")):
        assert not {answer.answer for answer in free} & {*colours, *directions}
    brought = [Prompt("x", p.id, p.text, ("up", "down")) for p in prompts]
    [answers] = open_predictor(run_dir, PredictOptions("routed", choices=("yes", "no"))).answers(brought)
    assert {answer.answer for answer in answers} <= {"up", "down"}  # what a prompt brings goes before what is asked


def test_choices_of_a_run_that_did_not_note_its_tasks(run: tuple[Path, StreamLoop], tmp_path: Path) -> None:
    run_dir, loop = run
    again = tmp_path / "run"
    shutil.copytree(run_dir, again)
    noted = open_predictor(again, PredictOptions("routed")).learnt
    (again / "tasks.json").unlink()
    found = open_predictor(again, PredictOptions("routed")).learnt
    assert (dict(found.choices), found.names) == (dict(noted.choices), noted.names)
    assert dict(noted.choices) == {test.task.name: test.task.choices for test in loop.evaluator.tests}


def test_generated_answers(tmp_path: Path) -> None:
    """Two tasks of free text, with another letter to repeat in each."""
    for name, letter in (("echo", "k"), ("next", "z")):
        for split, count in (("train", 12), ("test", 5)):
            rows = [Example(f"{split}{i}", f"{name} {3 * i + len(split)}:", 9 * letter) for i in range(count)]
            meta = SplitMeta(name, "generation", (), "exact_match", split, "made")
            write_split(join(tmp_path / "data" / name, f"{split}.parquet"), rows, meta)
    stream = {"source": "parquet", "path": str(tmp_path / "data"), "order": ["echo", "next"]}
    evaluation = {"max_new_tokens": 3, "router_margin": 2.0}
    train = {"steps": 30, "learning_rate": 0.1}
    config = tiny_config(tmp_path, stream=stream, evaluation=evaluation, train=train, treelora={"guard": None})
    loop = learnt(config, tmp_path / "run")
    given: dict[str, tuple[str, ...]] = {}
    for mode in MODES:
        answers = texts(predicted(open_predictor(tmp_path / "run", PredictOptions(mode)), loop, [0, 1]))
        assert answers == expected(loop, mode, [0, 1])
        given[mode] = tuple(answers.values())
    assert all(any(answers) for answers in given.values())
    assert given["last"] != given["routed"]
    prompt = Prompt("x", 1, "echo b:")
    longer = open_predictor(tmp_path / "run", PredictOptions("last", max_new_tokens=9))
    shorter = open_predictor(tmp_path / "run", PredictOptions("last", max_new_tokens=1))
    [[long]], [[short]] = longer.answers([prompt]), shorter.answers([prompt])
    assert len(long.answer) > len(short.answer)
    assert long.answer.startswith(short.answer)


@pytest.mark.parametrize("method", ["joint", "frozen"])
def test_methods_without_a_router_answer_with_what_they_have(method: str, tmp_path: Path) -> None:
    loop = learnt(tiny_config(tmp_path, method=method), tmp_path / "run")
    predictor = open_predictor(tmp_path / "run", PredictOptions())
    assert predictor.inference == "last"
    rows = [(task, row) for task in SEEN for row in range(len(loop.evaluator.tests[task]))]
    key = f"task {len(loop.bank) - 1}"
    assert texts(predicted(predictor, loop)) == {row: loop.evaluator._answers[key, row] for row in rows}
