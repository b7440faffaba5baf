"""Importers: each layout, what they skip and count, and what they refuse."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from treelora.data import open_task
from treelora.data.importers.trace import guess
from treelora.data.sources import IMPORTERS, Source, import_tasks
from treelora.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "cl_benchmark"
TEXT = [name for name, importer in IMPORTERS.items() if isinstance(importer, Source)]


def dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def olora_task(root: Path, name: str = "NLI/toy", **splits: list[Any]) -> None:
    dump(root / name / "labels.json", ["yes", "no"])
    rows = [{"sentence": f"text {i} ", "label": ("yes", "no")[i % 2]} for i in range(4)]
    for split in ("train", "test"):
        dump(root / name / f"{split}.json", splits.get(split, rows))
    if "dev" in splits:
        dump(root / name / "dev.json", splits["dev"])


class TestOlora:
    def test_rows_and_prompt(self, tmp_path: Path) -> None:
        olora_task(tmp_path / "in", dev=[{"sentence": "v", "label": "no"}])
        (report,) = import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out")
        assert (report.rows, report.skipped) == ({"train": 4, "validation": 1, "test": 4}, {})
        row = report.task.read("train")[1]
        assert (row.id, row.prompt) == ("train-1", "text 1\nOptions: yes, no\nAnswer:")
        assert (row.answer, row.choices) == ("no", ("yes", "no"))
        assert open_task(tmp_path / "out" / "toy") == report.task

    def test_unusable_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        good = {"sentence": "fine", "label": "yes"}
        rows = [
            good,
            {"sentence": "unlabelled", "label": "-"},
            {"sentence": None, "label": "yes"},
            {"sentence": 3, "label": "yes"},
            {"sentence": " ", "label": "yes"},
            {"sentence": "other", "label": "perhaps"},
            "a string",
            {"sentence": "\ud83d alone", "label": "yes"},
            {"sentence": "unlabelled too", "label": "-"},
            good,
        ]
        olora_task(tmp_path / "in", test=rows)
        (report,) = import_tasks("olora", str(tmp_path / "in"), ["toy"], tmp_path / "out")
        assert report.rows["test"] == 2
        assert report.skipped == {
            "label is '-' (no agreed label)": 2,
            "prompt is null": 1,
            "prompt is int, not text": 1,
            "prompt is blank": 1,
            "answer is not among the choices": 1,
            "row is not an object": 1,
            "prompt is not UTF-8": 1,
        }
        assert report.skipped_rows["label is '-' (no agreed label)"] == ("test[1]", "test[8]")
        assert [row.id for row in report.task.read("test")] == ["test-0", "test-9"]
        kept = json.loads(pq.read_schema(report.task.path("test")).metadata[b"treelora.task"])
        assert kept["skipped"] == report.skipped
        assert kept["rows"] == 2

    def test_invalid_utf8_costs_its_row(self, tmp_path: Path) -> None:
        olora_task(tmp_path / "in")
        path = tmp_path / "in" / "NLI" / "toy" / "test.json"
        path.write_bytes(path.read_bytes().replace(b"text 2", b"text \xff"))
        (report,) = import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out")
        assert (report.rows["test"], report.skipped) == (3, {"prompt is not UTF-8": 1})
        assert report.skipped_rows == {"prompt is not UTF-8": ("test[2]",)}

    def test_same_bytes_twice_and_no_leftovers(self, tmp_path: Path) -> None:
        olora_task(tmp_path / "in", dev=[{"sentence": "v", "label": "no"}])
        before = import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out")[0].task
        prints = [before.fingerprint(split) for split in ("train", "test")]
        (tmp_path / "in" / "NLI" / "toy" / "dev.json").unlink()
        after = import_tasks("olora", f"file://{tmp_path}/in", None, tmp_path / "out")[0].task
        assert [after.fingerprint(split) for split in ("train", "test")] == prints
        assert list(after.splits) == ["train", "test"]

    def test_names(self, tmp_path: Path) -> None:
        for name in ("A/one", "A/two", "B/two"):
            olora_task(tmp_path / "in", name)

        def names(asked: list[str] | None) -> list[str]:
            reports = import_tasks("olora", str(tmp_path / "in"), asked, tmp_path / "out")
            return [report.task.name for report in reports]

        assert names(["B/two", "one"]) == ["two", "one"]
        assert names(None) == ["one", "A/two", "B/two"]
        for asked, message in (
            (["two"], "'two' could be A/two or B/two"),
            (["three"], "no task 'three'; there are one, two, two"),
            (["one", "A/one"], "'one' is asked for twice"),
        ):
            with pytest.raises(DataError, match=message):
                names(asked)

    def test_refusals_leave_nothing_behind(self, tmp_path: Path) -> None:
        olora_task(tmp_path / "in", test=[{"sentence": "x", "label": "-"}])
        with pytest.raises(DataError, match=r"task 'toy' has no usable rows in its test split \(label is '-'.*: 1\)"):
            import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out")
        olora_task(tmp_path / "in", test=[{"text": "x", "label": "yes"}])
        with pytest.raises(DataError, match=r"no column 'sentence' for the prompt; found \['label', 'text'\]"):
            import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out")
        path = tmp_path / "in" / "NLI" / "toy" / "test.json"
        path.write_text('[{"sentence": "x", "la')
        with pytest.raises(DataError, match=re.escape(f"{path}: not complete JSON")):
            import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out")
        path.unlink()
        with pytest.raises(DataError, match=r"no test split.*options\.splits\.test"):
            import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_other_split_and_limit(self, tmp_path: Path) -> None:
        olora_task(tmp_path / "in", dev=[{"sentence": "v", "label": "no"}])
        options = {"splits": {"test": "dev"}, "limit": 3}
        (report,) = import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out", options=options)
        assert report.rows == {"train": 3, "validation": 1, "test": 1}

    @pytest.mark.skipif(not SHARED.exists(), reason="the shared copy of O-LoRA's benchmark is not here")
    def test_real_mnli_has_nine_unlabelled_rows(self, tmp_path: Path) -> None:
        (report,) = import_tasks("olora", str(SHARED), ["NLI/MNLI"], tmp_path)
        assert report.rows == {"train": 1000, "test": 491}
        assert report.skipped == {"label is '-' (no agreed label)": 9}
        assert report.skipped_rows["label is '-' (no agreed label)"][0] == "test[92]"


class TestTrace:
    def write(self, root: Path, name: str, answers: list[str]) -> None:
        for split in ("train", "eval", "test"):
            dump(
                root / name / f"{split}.json",
                [{"prompt": f"p{i}", "answer": a} for i, a in enumerate(answers)],
            )

    def test_known_tasks(self, tmp_path: Path) -> None:
        self.write(tmp_path / "in", "FOMC", ["A", "B", "C"])
        self.write(tmp_path / "in", "ScienceQA", ["A\nBecause.", "D", "An apple"])
        self.write(tmp_path / "in", "20Minuten", ["Ein Satz."])
        reports = {r.task.name: r for r in import_tasks("trace", str(tmp_path / "in"), None, tmp_path / "out")}
        shown = {name: (r.task.kind, r.task.metric, r.rows["validation"]) for name, r in reports.items()}
        assert shown == {
            "20Minuten": ("generation", "sari", 1),
            "FOMC": ("choice", "accuracy", 3),
            "ScienceQA": ("choice", "accuracy", 2),
        }
        assert [row.answer for row in reports["ScienceQA"].task.read("test")] == ["A", "D"]
        assert reports["ScienceQA"].skipped == {"answer is not among the choices": 3}

    def test_unknown_tasks_are_sorted_by_their_answers(self, tmp_path: Path) -> None:
        self.write(tmp_path / "in", "Moods", ["good", "bad"] * 3)
        (report,) = import_tasks("trace", str(tmp_path / "in"), None, tmp_path / "out")
        assert (report.task.kind, report.task.choices) == ("choice", ("bad", "good"))
        self.write(tmp_path / "in", "Sums", [str(i) for i in range(12)])
        self.write(tmp_path / "in", "Essays", ["some five words stand here", "and here are six more words"])
        reports = import_tasks("trace", str(tmp_path / "in"), ["Sums", "Essays"], tmp_path / "out")
        assert [(r.task.kind, r.task.metric) for r in reports] == [
            ("generation", "exact_match"),
            ("generation", "rouge_l"),
        ]
        assert guess([]).kind == "generation"


class TestEntryPoint:
    def test_unknown_source_and_options(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no importer 'xml'; there are olora, trace, jsonl"):
            import_tasks("xml", str(tmp_path), None, tmp_path)
        with pytest.raises(ConfigError, match=r"importer 'olora' has no option \['delimiter'\]"):
            import_tasks("olora", str(tmp_path), None, tmp_path, options={"delimiter": ";"})
        with pytest.raises(ConfigError, match="limit is 0"):
            import_tasks("olora", str(tmp_path), None, tmp_path, options={"limit": 0})
        olora_task(tmp_path)
        with pytest.raises(ConfigError, match=r"options\.splits names \['dev'\]"):
            import_tasks("olora", str(tmp_path), None, tmp_path / "out", options={"splits": {"dev": "test"}})

    @pytest.mark.parametrize("source", [name for name in TEXT if name != "hf"])
    def test_empty_and_missing_folders(self, tmp_path: Path, source: str) -> None:
        with pytest.raises(DataError, match=r"no folder with a (labels|train)\.\w+ below it"):
            import_tasks(source, str(tmp_path), None, tmp_path / "out")
        with pytest.raises(DataError, match="can't be listed"):
            import_tasks(source, str(tmp_path / "nowhere"), None, tmp_path / "out")

    def test_one_folder_for_one_task(self, tmp_path: Path) -> None:
        olora_task(tmp_path / "in", "A/my_task")
        olora_task(tmp_path / "in", "A/My Task")
        with pytest.raises(DataError, match=r"'my_task' meets 'My Task' in folder 'my-task'"):
            import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "out")
        with pytest.raises(DataError, match=r"holds task 'My Task'; import 'my_task' elsewhere"):
            import_tasks("olora", str(tmp_path / "in"), ["my_task"], tmp_path / "out")

    def test_imported_parquet_comes_back_as_it_was(self, tmp_path: Path) -> None:
        olora_task(tmp_path / "in")
        (first,) = import_tasks("olora", str(tmp_path / "in"), None, tmp_path / "one")
        (second,) = import_tasks("parquet", str(tmp_path / "one"), None, tmp_path / "two")
        assert second.task.read("train") == first.task.read("train")
        assert (second.task.name, second.task.choices) == (first.task.name, first.task.choices)
