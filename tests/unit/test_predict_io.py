"""`treelora predict` from outside: what it reads and writes, and what it says where something is wrong."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.support.serving import file_of, learnt
from tests.support.streams import TASKS, commits, tiny_config
from treelora.data.parquet import write_split
from treelora.data.schema import Example, SplitMeta
from treelora.errors import CheckpointError, ConfigError, DataError
from treelora.loop import StreamLoop
from treelora_platform.cli import app
from treelora_platform.config import parse_config
from treelora_platform.predict import PredictOptions, open_predictor, predict_file
from treelora_platform.predict_io import Answer, Prompt, answer_table, as_line, read_prompts, split_choices


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StreamLoop]:
    folder = tmp_path_factory.mktemp("predict")
    return folder / "run", learnt(tiny_config(folder), folder / "run")


def written(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "prompts.txt", "\ufefffirst  one\r\n\n  \n{third}\u2028still third")
    assert read_prompts(path) == [
        Prompt(f"{path}: line 1", 1, "first  one"),
        Prompt(f"{path}: line 4", 4, "{third}\u2028still third"),
    ]


def test_jsonl_takes_prompt_choices_and_id(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "answer": "never read"},
        {"prompt": "b", "id": "x", "choices": ["up", "down"]},
        {"id": 7, "prompt": "c", "choices": []},
        {"prompt": "d", "choices": None},
    ]
    path = written(tmp_path, "prompts.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    found = [(p.id, p.text, p.choices) for p in read_prompts(path)]
    assert found == [(1, "a", None), ("x", "b", ("up", "down")), (7, "c", ()), (7, "d", None)]
    assert read_prompts(path, "text")[0].text == json.dumps(lines[0])


def test_parquet_of_a_task_without_its_answers(tmp_path: Path) -> None:
    rows = [Example("r0", "p0", "no", ("yes", "no")), Example("r1", "p1", "up", ("up", "down"))]
    path = tmp_path / "test.parquet"
    write_split(path, rows, SplitMeta("mine", "choice", (), "accuracy", "test", "made"))
    wanted = [("r0", "p0", ("yes", "no")), ("r1", "p1", ("up", "down"))]
    assert [(p.id, p.text, p.choices) for p in read_prompts(str(path))] == wanted
    pq.write_table(pq.read_table(path).drop_columns(["answer"]), path)  # no label is needed, so none is missed
    assert [(p.id, p.text, p.choices) for p in read_prompts(str(path))] == wanted
    shared = [Example("r0", "p0", "no")]
    write_split(path, shared, SplitMeta("mine", "choice", ("yes", "no"), "accuracy", "test", "made"))
    assert read_prompts(str(path))[0].choices == ("yes", "no")
    write_split(path, shared, SplitMeta("mine", "generation", (), "rouge_l", "test", "made"))
    assert read_prompts(str(path))[0].choices == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3: is not JSON"),
        ('["a"]', "line 1: holds a list, expected an object with a `prompt`"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: `prompt` is None"),
        ('{"prompt": " "}', "line 1: `prompt` is ' '; it must be a text that isn't blank"),
        ('{"prompt": "a\\ud800"}', "line 1: `prompt` holds half a character"),
        ('{"prompt": "a", "id": true}', "line 1: `id` is True"),
        ('{"prompt": "a", "choices": "ab"}', "line 1: `choices` is 'ab'; use a list of texts"),
        ('{"prompt": "a", "choices": ["x", "x"]}', "line 1: `choices` repeats 'x'"),
        ('{"prompt": "a", "choices": ["x", ""]}', "line 1: `choices` has a blank choice"),
        ("[" * 100_000, "line 1: is not JSON"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2: is not UTF-8"),
        ("\n \n", "holds no prompt; write one a line"),
        ("", "holds no prompt"),
    ],
)
def test_a_wrong_line_is_named(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, "prompts.jsonl", text)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-such\.txt: can't be read"):
        read_prompts(str(tmp_path / "no-such.txt"))
    broken = written(tmp_path, "x.parquet", "no parquet")
    with pytest.raises(DataError, match=r"x\.parquet: not a complete Parquet file"):
        read_prompts(broken)
    with pytest.raises(ConfigError, match="format 'csv': use text, jsonl, parquet"):
        read_prompts(broken, "csv")
    with pytest.raises(ConfigError, match="name the file"):
        read_prompts("-", "parquet")


def test_choices_of_the_command_line() -> None:
    assert (split_choices("a, b c ,d"), split_choices("")) == (("a", "b c", "d"), ())
    for text, message in (("a,,b", "has a blank choice"), ("a,a", "repeats 'a'")):
        with pytest.raises(ConfigError, match=message):
            split_choices(text)


def invoke(*arguments: str, given: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, ["predict", *arguments], input=given)


def test_lines_of_json_for_a_pipe(run: tuple[Path, StreamLoop]) -> None:
    run_dir, loop = run
    path = file_of(loop.evaluator.tests[1].task)
    predictor = open_predictor(run_dir, PredictOptions("routed"))
    answers = [answer for part in predictor.answers(read_prompts(path)) for answer in part]
    result = invoke(str(run_dir), path, "--inference", "routed")
    assert result.exit_code == 0
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [list(line) for line in lines] == [
        ["id", "prompt", "answer", "task", "margin", "runner_up", "fallback", "ms"]
    ] * len(answers)
    assert [line | {"ms": 0} for line in lines] == [json.loads(as_line(answer)) | {"ms": 0} for answer in answers]


@pytest.mark.parametrize("given", ["Tomorrow Anna will sleep.\nnext\n", '{"prompt": "Tomorrow"}\n{"prompt": "next"}\n'])
def test_standard_input(given: str, run: tuple[Path, StreamLoop]) -> None:
    result = invoke(str(run[0]), "-", "--choices", "yes,no", given=given)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["id"], line["task"], line["margin"]) for line in lines] == [(1, None, None), (2, None, None)]
    assert {line["answer"] for line in lines} <= {"yes", "no"}
    assert lines[1]["prompt"] == "next"
    assert invoke(str(run[0]), given="x\n").exit_code == 0  # also where no file is named


def test_a_file_of_answers_appears_whole_or_not_at_all(run: tuple[Path, StreamLoop], tmp_path: Path) -> None:
    out, prompts = tmp_path / "answers.jsonl", written(tmp_path, "p.txt", "one\ntwo\n")
    result = invoke(str(run[0]), prompts, "--task", TASKS[1], "--out", str(out))
    assert (result.exit_code, result.stdout) == (0, "")
    assert [json.loads(line)["task"] for line in out.read_text().splitlines()] == [TASKS[1]] * 2
    before = out.read_bytes()
    long = written(tmp_path, "q.jsonl", json.dumps({"prompt": "a", "choices": ["x" * 600, "y"]}))
    result = invoke(str(run[0]), long, "--out", str(out))
    assert result.exit_code == 2
    assert "a choice has 602 tokens, the run's max_length is 512" in " ".join(result.stderr.split())
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "p.txt", "q.jsonl"]
    missing = tmp_path / "nowhere" / "answers.jsonl"
    assert "can't be written (No such file or directory)" in invoke(str(run[0]), prompts, "--out", str(missing)).stderr


def test_a_table_for_a_terminal(run: tuple[Path, StreamLoop], tmp_path: Path) -> None:
    prompts = written(tmp_path, "p.txt", "[bold]one[/]\n" + "long " * 40)
    console = Console(width=200, file=io.StringIO())
    predict_file(run[0], prompts, PredictOptions("routed", router_margin=1e9), table=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 prompts, inference routed" in shown
    assert "[bold]one[/]" in shown
    assert shown.count(" avg ") == 2
    assert "the average of the tasks around both answered" in shown
    assert "…" in shown


def test_the_tables_columns() -> None:
    unsure = Answer("a", "p", "yes", "one", 1.25, "two", True, 3.0)
    plain = Answer(1, "p", "yes", None, None, None, False, 4.0)
    headers = [[str(c.header) for c in answer_table([a], "x").columns] for a in (unsure, plain)]
    assert headers[0] == ["id", "prompt", "taken for", "margin", "runner-up", "answer", "ms"]
    assert headers[1] == ["id", "prompt", "answer", "ms"]
    assert [list(c.cells) for c in answer_table([unsure], "x").columns][3] == ["1.2 avg"]


def refusal(run_dir: Path, **options: Any) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        open_predictor(run_dir, PredictOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals(run: tuple[Path, StreamLoop], tmp_path: Path) -> None:
    run_dir, _ = run
    assert "no run is there (no config.yaml)" in refusal(tmp_path / "nothing")
    unknown = refusal(run_dir, task="november")
    assert unknown == f"{run_dir}: there is no task 'november'; it has learnt {', '.join(TASKS)}"
    assert refusal(run_dir, inference="best") == "--inference 'best': use last, merged, routed"
    assert "exclude each other" in refusal(run_dir, inference="last", task=TASKS[0])
    assert "evaluation.batch_rows" in refusal(run_dir, batch_rows=0)
    assert "evaluation.router_margin" in refusal(run_dir, router_margin=float("nan"))
    result = invoke(str(tmp_path / "nothing"), given="x\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error:")


def test_refusals_of_runs_without_a_router(tmp_path: Path) -> None:
    for method, message in (
        ("joint", "there is no router (method joint, evaluation.modes last, merged, routed); use --inference last"),
        ("frozen", "there is no router (method frozen"),
    ):
        run_dir = tmp_path / method
        learnt(tiny_config(tmp_path, method=method), run_dir)
        assert message in refusal(run_dir, inference="routed")
        assert f"there is no task 'x'; method {method} learns none by itself" in refusal(run_dir, task="x")
    assert "method frozen has no adapters to merge" in refusal(tmp_path / "frozen", inference="merged")


def test_unfinished_and_damaged_runs(run: tuple[Path, StreamLoop], tmp_path: Path) -> None:
    run_dir, _ = run
    again = tmp_path / "run"
    shutil.copytree(run_dir, again)
    (again / "run.json").write_text('{"status": "FAILED"}')
    notes: list[str] = []
    made = commits(again)
    with (made[-1] / "adapter.safetensors").open("ab") as file:
        file.write(b"x")
    predictor = open_predictor(again, PredictOptions("last"), notes.append)
    assert "commit passed over" in notes[0]
    assert notes[1:] == ["the run is FAILED; it has learnt 3 tasks so far"]
    for folder in made:
        if not folder.name.endswith("0001-step000002"):
            shutil.rmtree(folder)
    predictor = open_predictor(again, PredictOptions("last"), notes.append)
    assert len(predictor.learnt.bank) == 1
    assert predictor.learnt.last is predictor.learnt.bank[0]  # not the adapter that task 2 has just begun with
    [answer] = [a for part in predictor.answers([Prompt("x", 1, "x", ("a", "b"))]) for a in part]
    assert answer.answer in ("a", "b")
    alone = open_predictor(again, PredictOptions("routed", router_margin=1e9))
    [[answer]] = list(alone.answers([Prompt("x", 1, "x")]))
    assert (answer.task, answer.margin, answer.runner_up, answer.fallback) == (TASKS[0], None, None, False)
    as_line(answer)
    shutil.rmtree(again / "checkpoints")
    assert "no task is learnt yet" in refusal(again)
    (again / "tasks.json").write_text("[]")
    with pytest.raises(DataError, match=r"tasks\.json: holds a list"):
        open_predictor_at(run_dir, again)


def open_predictor_at(whole: Path, damaged: Path) -> None:
    shutil.copytree(whole / "checkpoints", damaged / "checkpoints")
    open_predictor(damaged, PredictOptions("routed"))


def test_long_prompts_are_cut_or_refused_as_the_run_does(run: tuple[Path, StreamLoop], tmp_path: Path) -> None:
    run_dir, _ = run
    again = tmp_path / "run"
    shutil.copytree(run_dir, again)
    plain = tiny_config(tmp_path).as_dict()
    model = plain["model"] | {"max_length": 16}
    (again / "config.yaml").write_text(parse_config(plain | {"model": model}).as_yaml())
    predictor = open_predictor(again, PredictOptions("last"))
    long = Prompt("x: line 3", 1, "a" * 40 + "0123456789", ("bcde", "f"))
    fits = Prompt("x: line 4", 2, "0123456789", ("bcde", "f"))  # 16 less four letters, a space and an end
    [answers] = predictor.answers([long, fits])
    assert answers[0].answer == answers[1].answer
    assert predictor.cut == 1
    rows = [
        predictor._fitted(row, predictor._choice_ids(row, fits.choices or ())) for row in predictor._rows([long, fits])
    ]
    assert rows[0] == rows[1] == [ord(c) - 33 for c in "0123456789"]
    (again / "config.yaml").write_text(parse_config(plain | {"model": model | {"long_rows": "refuse"}}).as_yaml())
    with pytest.raises(DataError, match="x: line 3: the prompt has 50 tokens, there is room for 10"):
        list(open_predictor(again, PredictOptions("last")).answers([long]))


def test_no_ray_in_the_process(run: tuple[Path, StreamLoop], tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from treelora_platform.predict import PredictOptions, predict_file\n"
        f"predict_file(Path({str(run[0])!r}), {written(tmp_path, 'p.txt', 'one')!r}, PredictOptions())\n"
        "assert not {'ray', 'deepspeed', 'mlflow'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stderr
