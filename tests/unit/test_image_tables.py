"""Tables of encoded images: foreign Parquet, this package's own, Hugging Face data sets."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.images import class_folders, encoded, noise
from treelora.data import import_tasks
from treelora.data.images import ImageExample, read_images
from treelora.data.sources import ImportReport
from treelora.errors import ConfigError, DataError


def rows_of(report: ImportReport, split: str) -> list[ImageExample]:
    return list(read_images(report.task.path(split)))


class TestTables:
    def table(self, path: Path, images: Any, labels: Any, metadata: dict[str, str] | None = None, **names: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {names.get("image", "image"): images, names.get("label", "label"): labels}
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=3)

    def both(self, root: Path, images: Any, labels: Any, metadata: dict[str, str] | None = None, **names: str) -> None:
        for split in ("train", "test"):
            self.table(root / f"{split}.parquet", images, labels, metadata, **names)

    def read(self, tmp_path: Path, **options: Any) -> list[ImportReport]:
        return import_tasks("images", str(tmp_path / "in"), None, tmp_path / "out", options={"tasks": 2, **options})

    def test_bytes_and_names(self, tmp_path: Path) -> None:
        images = [encoded(noise(i)) for i in range(8)]
        self.both(tmp_path / "in", images, ["d", "c", "b", "a"] * 2)
        first, second = self.read(tmp_path)
        assert [(row.id, row.label, row.image) for row in rows_of(first, "train")] == [
            (f"train-{i}", "dcba"[i % 4], images[i]) for i in (2, 3, 6, 7)
        ]
        assert [row.image for row in rows_of(second, "test")] == [images[i] for i in (0, 1, 4, 5)]

    def test_structs_numbers_and_class_names_of_the_hub(self, tmp_path: Path) -> None:
        images = [{"bytes": encoded(noise(i)), "path": None} for i in range(4)] + [{"bytes": None, "path": "x"}, None]
        features = {"target": {"names": ["w", "x", "y", "z"], "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        self.both(tmp_path / "in", images, [0, 1, 2, 3, 3, 2], metadata, image="img", label="target")
        first, second = self.read(tmp_path, image_column="img", label_column="target")
        assert (first.task.choices, second.task.choices) == (("w", "x"), ("y", "z"))
        assert [row.image for row in rows_of(first, "test")] == [encoded(noise(i)) for i in (0, 1)]
        assert second.skipped == {"image is empty": 4}
        self.both(tmp_path / "in", [*images[:4], images[0]], [10, 9, 2, 1, -1])
        assert self.read(tmp_path)[0].skipped == {"label is negative": 2}
        assert [r.task.choices for r in self.read(tmp_path, limit=2)] == [("1", "2"), ("9", "10")]
        with pytest.raises(ConfigError, match=r"options\.limit is 1, but task 'classes 1 and 2' has 2 classes"):
            self.read(tmp_path, limit=1)

    def test_labels_that_can_not_be_used(self, tmp_path: Path) -> None:
        broken = pa.array([b"a", b"b", b"\xff", None, b" "]).cast(pa.binary()).view(pa.string())
        self.both(tmp_path / "in", [encoded(noise(i)) for i in range(5)], broken)
        (report,) = self.read(tmp_path, tasks=1)
        assert report.rows == {"train": 2, "test": 2}
        assert report.skipped == {"label is not UTF-8": 2, "label is null": 2, "label is blank": 2}

    def test_columns(self, tmp_path: Path) -> None:
        self.both(tmp_path / "in", [b"x"], ["a"])
        with pytest.raises(DataError, match=r"no column 'img' for the image .*options\.image_column"):
            self.read(tmp_path, image_column="img")
        with pytest.raises(DataError, match=r"no column 'target' for the label"):
            self.read(tmp_path, label_column="target")
        with pytest.raises(ConfigError, match=r"options\.image_column is 3"):
            self.read(tmp_path, image_column=3)
        for images, labels, message in (
            (["text"], ["a"], "column 'image' is string, expected binary"),
            ([{"bytes": "text"}], ["a"], r"column 'image\.bytes' is string"),
            ([b"x"], [1.5], "column 'label' is double, expected string or whole numbers"),
        ):
            self.both(tmp_path / "in", images, labels)
            with pytest.raises(DataError, match=message):
                self.read(tmp_path)

    def test_own_files_come_back_as_they_were(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "f", {f"{s}/c{i}": 2 for s in ("train", "test") for i in range(1, 25)})
        made = import_tasks(
            "image_folder", str(tmp_path / "f"), None, tmp_path / "in",
            options={"classes_per_task": 2, "protocol": "task_incremental"},
        )  # fmt: skip
        again = import_tasks("images", str(tmp_path / "in"), None, tmp_path / "out")
        assert [r.task.name for r in again] == [r.task.name for r in made]
        assert [r.task.choices for r in again] == [r.task.choices for r in made]
        assert again[5].task.protocol == "task_incremental"
        assert rows_of(again[5], "train") == rows_of(made[5], "train")
        (one,) = import_tasks(
            "images", str(tmp_path / "in"), ["classes c3 and c4"], tmp_path / "2", options={"limit": 2}
        )
        assert [row.label for row in rows_of(one, "train")] == ["c3", "c4"]
        with pytest.raises(ConfigError, match="their protocol was chosen when they were imported"):
            self.read(tmp_path)
        with pytest.raises(DataError, match="no task 'x'; there are classes c1 and c2; classes c3 and c4"):
            import_tasks("images", str(tmp_path / "in"), ["x"], tmp_path / "2")
        with pytest.raises(DataError, match="holds images; import it with source 'images'"):
            import_tasks("parquet", str(tmp_path / "in"), None, tmp_path / "3")


class TestHuggingFace:
    def save(self, folder: Path, images: list[Any], kind: str = "image") -> None:
        datasets = pytest.importorskip("datasets")
        labels = datasets.ClassLabel(names=["b", "a"])
        feature = datasets.Image() if kind == "image" else datasets.Value("binary")
        features = datasets.Features({"pic": feature, "kind": labels})
        if kind == "image":
            images = [{"bytes": data, "path": None} for data in images]
        rows = {"pic": images, "kind": [i % 2 for i in range(len(images))]}
        split = datasets.Dataset.from_dict(rows, features=features)
        datasets.DatasetDict({"train": split, "dev": split, "held": split}).save_to_disk(str(folder))

    @pytest.mark.parametrize("kind", ["image", "binary"])
    def test_bytes_are_taken_as_they_are(self, tmp_path: Path, kind: str) -> None:
        images = [encoded(noise(i), "JPEG") for i in range(4)]
        self.save(tmp_path / "in", [*images, b"broken"], kind)
        options = {"image_column": "pic", "label_column": "kind", "splits": {"test": "held"}, "tasks": 1}
        (report,) = import_tasks("hf_images", str(tmp_path / "in"), None, tmp_path / "out", options=options)
        assert report.task.choices == ("a", "b")
        assert report.rows == {"train": 4, "validation": 4, "test": 4}
        assert [row.image for row in rows_of(report, "test")] == images
        assert [row.label for row in rows_of(report, "test")] == ["b", "a", "b", "a"]
        assert report.skipped == {"image can't be decoded": 3}
        assert report.skipped_rows["image can't be decoded"] == ("train[4]", "validation[4]", "test[4]")

    def test_columns_and_splits(self, tmp_path: Path) -> None:
        self.save(tmp_path / "in", [encoded(noise(0))] * 2)

        def read(**options: Any) -> None:
            import_tasks("hf_images", str(tmp_path / "in"), None, tmp_path / "out", options={"tasks": 1, **options})

        with pytest.raises(DataError, match="no test split"):
            read()
        splits = {"test": "held"}
        with pytest.raises(DataError, match=r"no column 'image' for the image; found \['kind', 'pic'\]"):
            read(splits=splits)
        with pytest.raises(DataError, match=r"column 'kind' is .* expected images or their encoded bytes"):
            read(splits=splits, image_column="kind", label_column="kind")
