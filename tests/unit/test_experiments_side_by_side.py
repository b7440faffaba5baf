import pytest
from rich.console import Console

from tests.support.records import record
from tests.support.run_dir import SyntheticRun, finished_run
from treelora.errors import DataError
from treelora_platform.experiments.records import RunRecord
from treelora_platform.experiments.side_by_side import compare_two, is_run_folder


class Memory:
    """A history of records without artifacts."""

    shown = "memory"

    def __init__(self, *records: RunRecord):
        self.records = records

    def run(self, run_id):
        return next(r for r in self.records if r.run_id == run_id)

    def named(self, name):
        return [r for r in reversed(self.records) if r.name == name]

    def download(self, run_id, folder):
        folder.mkdir(parents=True)
        return folder


def compared(history, a, b, out, **more):
    console = Console(record=True, width=200)
    page = compare_two(history, str(a), str(b), out, console, **more)
    return page, (out / "comparison.md").read_text(), console.export_text()


def write_config(run, text):
    (run.path / "config.yaml").write_text(text)


def test_two_folders_need_no_mlflow(tmp_path):
    one = finished_run(tmp_path / "one", ["alpha", "beta", "gamma"], name="first")
    two = SyntheticRun(tmp_path / "two", ["beta", "alpha", "delta"], name="second", method="sequential")
    two.write_steps(1, 18)
    for after in range(3):
        two.write_scores(after, {"last": [50.0 - 5 * after] * (after + 1)})
    two.write_tasks(3)
    write_config(one, "{name: first, method: treelora, lora: {rank: 8}, treelora: {strength: 0.5}, train: {steps: 6}}")
    write_config(two, "{name: second, method: sequential, lora: {rank: 4}, treelora: {strength: 0}, train: {steps: 6}}")
    page, text, shown = compared(None, one.path, two.path, tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert "first (treelora) against second (sequential)" in page.read_text()
    assert text.index("What differs in the configuration") < text.index("## Numbers")
    configuration = text[text.index("| field") : text.index("## Numbers")]
    assert configuration.split("\n")[2:5] == [
        "| lora.rank | 8 | 4 |", "| method | treelora | sequential |", "| treelora.strength | 0.5 | not used |",
    ]  # fmt: skip
    assert (
        "- The tasks differ, so OP and BWT are of different tasks: only first has gamma; only second has delta; "
        "comparable are the last scores of alpha, beta."
    ) in text
    # the first ends with (70, 80, 90) in `last`, each learnt at 90; the second with 40 on all, after 50, 45 and 40
    assert "| OP last (%) | 80.00 | 40.00 | -40.00 |" in text
    assert "| BWT last (points) | 10.00 | 5.00 | -5.00 |" in text
    assert "| OP routed (%) | 89.00 | – | – |" in text
    assert "| training time | 9.0 s | 9.0 s | +0% |" in text
    assert "| alpha | last | 70.0 | 40.0 | -30.0 |" in text
    assert "| beta | last | 80.0 | 40.0 | -40.0 |" in text
    assert "gamma | last" not in text
    assert shown.index("The tasks differ") < shown.index("lora.rank") < shown.index("OP last (%)")


def test_runs_of_mlflow_without_artifacts_are_compared_by_what_it_knows(tmp_path):
    old = record("ewc", "a, b", op=1.0, name="mine", lora__rank=8)
    runs = (
        old,
        record("ewc", "b, a", op=40.0, bwt=3.0, tasks={"a": 30.0, "b": 50.0}, name="mine", lora__rank=8, seconds=10),
        record("ewc", "b, a", op=99.0, name="mine", status="RUNNING"),
        record("gem", "a, b", op=44.0, tasks={"a": 31.5, "b": 56.5}, name="theirs", lora__rank=16, ewc__strength=2),
    )
    page, text, _ = compared(Memory(*runs), "mine", runs[3].run_id, tmp_path)
    assert page == tmp_path / "comparison.md"
    assert "| OP last (%) | 40.00 | 44.00 | +4.00 |" in text
    assert "| BWT last (points) | 3.00 | – | – |" in text
    assert "| training time | 10.0 s | – | – |" in text
    assert "| b | last | 50.0 | 56.5 | +6.5 |" in text
    assert "| lora.rank | 8 | 16 |" in text
    assert "| ewc.strength | – | not used |" in text
    assert "- The order of the tasks differs: b, a against a, b." in text
    assert f"- mine: MLflow run {runs[1].run_id}, FINISHED, without artifacts" in text
    assert text.count("- No report: ") == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [record(name="same", seed=0), record(name="same", seed=1)]
    _, text, _ = compared(Memory(*runs), runs[0].run_id, runs[1].run_id, tmp_path)
    assert "| field | same #1 | same #2 |" in text
    assert "| seed | 0 | 1 |" in text


def test_equal_configurations_have_no_table_of_differences(tmp_path):
    runs = [record(name=name, cluster__workers=1) for name in ("x", "y")]
    _, text, _ = compared(Memory(*runs), "x", "y", tmp_path, html=False)
    assert "What differs" not in text
    assert "- The configurations don't differ in anything that can matter." in text


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(
        DataError, match=r"'nobody' is neither the folder nor the MLflow id nor the name of a run in memory"
    ):
        compared(Memory(), "nobody", "x", tmp_path)
    sweep = record(name="s", tags={"treelora.kind": "sweep"})
    with pytest.raises(DataError, match="s is a sweep, not one run; give two of its trials"):
        compared(Memory(sweep), sweep.run_id, "x", tmp_path)
    with pytest.raises(DataError, match="no run is there"):
        compared(None, tmp_path, "x", tmp_path)
    assert not is_run_folder(str(tmp_path))
