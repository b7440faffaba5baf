"""Runs that answer prompts, and what their evaluator answers to the same rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.support.streams import TASKS, execute
from treelora.data.task import Task
from treelora.evaluation.evaluator import Row
from treelora.loop import StreamLoop
from treelora_platform.config import ExperimentConfig
from treelora_platform.predict_io import Answer, read_prompts
from treelora_platform.serving import Predictor

SEEN = [0, 1, 2]


def learnt(config: ExperimentConfig, run_dir: Path) -> StreamLoop:
    """A run as `treelora run` leaves it, made in this process."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(config.as_yaml())
    loop = execute(config, run_dir)
    (run_dir / "run.json").write_text(json.dumps({"status": "FINISHED", "tasks": list(TASKS)}))
    return loop


def expected(loop: StreamLoop, mode: str, seen: Sequence[int] = SEEN) -> dict[Row, str]:
    """What the evaluator answers, its kept answers included."""
    if mode == "routed":
        past = loop.method.task_tree(loop.engine)
        tree, groups = (past.tree, past.groups) if past else (None, None)
        return loop.evaluator._routed(seen, loop.bank, tree, groups)
    return loop.evaluator._answer(mode, seen, loop.bank)


def file_of(task: Task) -> str:
    return str(task.path("test"))


def predicted(predictor: Predictor, loop: StreamLoop, tasks: Sequence[int] = SEEN) -> dict[Row, Answer]:
    """Answers to the test files of all tasks, by the evaluator's rows."""
    found = {}
    for task in tasks:
        test = loop.evaluator.tests[task]
        answers = [answer for part in predictor.answers(read_prompts(file_of(test.task))) for answer in part]
        by_id = {answer.id: answer for answer in answers}
        assert [answer.id for answer in answers] == [prompt.id for prompt in read_prompts(file_of(test.task))]
        found |= {(task, row): by_id[example.id] for row, example in enumerate(test.examples)}
    return found


def texts(answers: dict[Row, Answer]) -> dict[Row, str]:
    return {row: answer.answer for row, answer in answers.items()}
