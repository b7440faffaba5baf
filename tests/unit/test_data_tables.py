"""Importing tables: JSON lines, CSV, foreign Parquet and Hugging Face data sets."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treelora.data.sources import import_tasks
from treelora.errors import DataError


class TestTables:
    def jsonl(self, folder: Path, lines: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def test_jsonl(self, tmp_path: Path) -> None:
        rows = [
            {"q": "one?", "answer": "1", "id": "x"},
            {"q": "two?", "answer": "2", "id": "x"},
            {"q": "three?"},
        ]
        self.jsonl(tmp_path / "sums", [*map(json.dumps, rows), "not json", json.dumps({"q": "4?", "answer": 4})])
        options = {"columns": {"prompt": "q"}, "metric": "exact_match"}
        (report,) = import_tasks("jsonl", str(tmp_path / "sums"), None, tmp_path / "out", options=options)
        assert (report.task.name, report.task.kind, report.task.metric) == (
            "sums",
            "generation",
            "exact_match",
        )
        assert report.rows == {"train": 1, "test": 1}
        assert report.skipped == {
            "id is repeated": 2,
            "answer is null": 2,
            "line is not JSON": 2,
            "answer is int, not text": 2,
        }

    def test_jsonl_choices_by_row_or_by_kind(self, tmp_path: Path) -> None:
        by_row = [
            {"prompt": "p", "answer": "b", "choices": ["a", "b"]},
            {"prompt": "q", "answer": "a", "choices": "ab"},
        ]
        self.jsonl(tmp_path / "rows", [json.dumps(row) for row in by_row])
        (report,) = import_tasks("jsonl", str(tmp_path / "rows"), None, tmp_path / "out")
        assert (report.task.kind, report.skipped) == ("choice", {"choices are not a list of texts": 2})
        assert report.task.read("test")[0].choices == ("a", "b")
        self.jsonl(tmp_path / "kind", [json.dumps({"prompt": "p", "answer": a}) for a in "bca"])
        (report,) = import_tasks("jsonl", str(tmp_path / "kind"), None, tmp_path / "out", options={"kind": "choice"})
        assert report.task.choices == ("a", "b", "c")

    def test_jsonl_cut_short(self, tmp_path: Path) -> None:
        self.jsonl(tmp_path / "t", [json.dumps({"prompt": "p", "answer": "a"})] * 2)
        path = tmp_path / "t" / "test.jsonl"
        path.write_bytes(path.read_bytes()[:-6])
        with pytest.raises(DataError, match=r"test\.jsonl: line 2 breaks off"):
            import_tasks("jsonl", str(tmp_path / "t"), None, tmp_path / "out")

    def test_csv(self, tmp_path: Path) -> None:
        (tmp_path / "t").mkdir()
        text = '\ufeffprompt;answer;choices\n"two\nlines; here";a;a|b\nshort;a\nlast;b;a|b\n'
        for split in ("train", "dev", "test"):
            (tmp_path / "t" / f"{split}.csv").write_text(text, encoding="utf-8")
        (report,) = import_tasks("csv", str(tmp_path), ["t"], tmp_path / "out", options={"delimiter": ";"})
        assert report.rows == {"train": 2, "validation": 2, "test": 2}
        assert report.skipped == {"row has more or fewer cells than the header": 3}
        first = report.task.read("train")[0]
        assert (first.prompt, first.answer, first.choices) == ("two\nlines; here", "a", ("a", "b"))
        (tmp_path / "t" / "test.csv").write_text('prompt;answer\n"open', encoding="utf-8")
        with pytest.raises(DataError, match=r"test\.csv: row 0: not CSV"):
            import_tasks("csv", str(tmp_path), ["t"], tmp_path / "out", options={"delimiter": ";"})

    def test_wrong_column(self, tmp_path: Path) -> None:
        self.jsonl(tmp_path / "t", [json.dumps({"question": "p", "answer": "a"})])
        with pytest.raises(DataError, match=r"no column 'prompt'.*found \['answer', 'question'\].*options\.columns"):
            import_tasks("jsonl", str(tmp_path / "t"), None, tmp_path / "out")

    def test_foreign_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "t").mkdir()
        broken = pa.array([b"p", b"\xff", b"q"]).view(pa.string())
        table = pa.table({"text": broken, "answer": ["a", "b", None], "other": [1, 2, 3]})
        for split in ("train", "test"):
            pq.write_table(table, tmp_path / "t" / f"{split}.parquet")
        options = {"columns": {"prompt": "text"}}
        (report,) = import_tasks("parquet", str(tmp_path), None, tmp_path / "out", options=options)
        assert report.rows == {"train": 1, "test": 1}
        assert report.skipped == {"prompt is not UTF-8": 2, "answer is null": 2}


class TestHuggingFace:
    def save(self, folder: Path) -> None:
        datasets = pytest.importorskip("datasets")
        labels = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
        )
        split = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [0, 1, -1]}, features=labels)
        datasets.DatasetDict({"train": split, "validation": split, "unlabelled": split}).save_to_disk(str(folder))

    def test_class_labels_become_choices(self, tmp_path: Path) -> None:
        self.save(tmp_path / "reviews")
        options = {"columns": {"prompt": "text", "answer": "label"}, "splits": {"test": "validation"}}
        (report,) = import_tasks("hf", str(tmp_path / "reviews"), None, tmp_path / "out", options=options)
        assert (report.task.name, report.task.choices) == ("reviews", ("bad", "good"))
        assert report.rows == {"train": 2, "validation": 2, "test": 2}
        assert report.skipped == {"label is outside the class names": 3}
        assert [row.answer for row in report.task.read("test")] == ["bad", "good"]

    def test_missing_package_and_missing_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("datasets")
        tmp_path.joinpath("empty").mkdir()
        with pytest.raises(DataError, match="can't be loaded as a Hugging Face data set"):
            import_tasks("hf", str(tmp_path / "empty"), None, tmp_path / "out")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"pip install 'treelora\[data\]'"):
            import_tasks("hf", str(tmp_path / "empty"), None, tmp_path / "out")
