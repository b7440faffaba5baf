"""Layouts of images in files: label files, ImageNet-R, CUB-200-2011, CIFAR-100."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.images import class_folders, encoded, hash_of, noise, put
from treelora.data import import_tasks
from treelora.data.images import ImageExample, decode, read_images
from treelora.data.sources import ImportReport
from treelora.errors import DataError


def rows_of(report: ImportReport, split: str) -> list[ImageExample]:
    return list(read_images(report.task.path(split)))


class TestLabelFiles:
    labels = (("train/x.png", "cat"), ("train/y.png", "dog"), ("test/z.png", "dog"), ("test/w.png", "cat"))

    def flat(self, root: Path) -> None:
        for name, _ in self.labels:
            put(root / name, encoded(noise(hash_of(name))))

    def read(self, tmp_path: Path, labels: str = "labels.csv", **options: Any) -> ImportReport:
        path = str(tmp_path / "in")
        return import_tasks(
            "image_folder", path, None, tmp_path / "out", options={"tasks": 1, "labels": labels, **options}
        )[0]

    def csv(self, tmp_path: Path, rows: Any, header: str = "filename,label") -> None:
        put(tmp_path / "in/labels.csv", "\n".join([header, *map(",".join, rows)]).encode())

    @pytest.mark.parametrize("form", ["csv", "object", "list"])
    def test_forms(self, tmp_path: Path, form: str) -> None:
        self.flat(tmp_path / "in")
        self.csv(tmp_path, self.labels)
        items: Any = [{"filename": name, "label": label} for name, label in self.labels]
        if form != "csv":
            (tmp_path / "in/labels.csv").unlink()
            put(tmp_path / "in/labels.json", json.dumps(dict(self.labels) if form == "object" else items).encode())
        report = self.read(tmp_path, "labels.csv" if form == "csv" else "labels.json")
        assert [(row.id, row.label) for row in rows_of(report, "train")] == list(self.labels[:2])
        assert [(row.id, row.label) for row in rows_of(report, "test")] == [self.labels[3], self.labels[2]]
        assert report.skipped == {}

    def test_without_splits(self, tmp_path: Path) -> None:
        names = [f"images/{i}.png" for i in range(10)]
        for name in names:
            put(tmp_path / "in" / name, encoded(noise(hash_of(name))))
        self.csv(tmp_path, [(name, str(i % 2)) for i, name in enumerate(names)])
        report = self.read(tmp_path, test_share=0.4)
        assert report.rows == {"train": 6, "test": 4}
        assert all(row.label == str(int(row.id[7]) % 2) for row in rows_of(report, "train"))

    def test_missing_files_and_unlabelled_images_are_counted(self, tmp_path: Path) -> None:
        self.flat(tmp_path / "in")
        put(tmp_path / "in/train/extra.png", encoded(noise(1)))
        self.csv(tmp_path, [*self.labels, ("train/gone.png", "cat")])
        report = self.read(tmp_path)
        assert report.skipped == {"image is not in the label file": 1, "file is missing": 1}
        assert report.skipped_rows["file is missing"] == ("train/gone.png",)

    def test_folders_that_disagree(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {f"{s}/{c}": 1 for s in ("train", "test") for c in ("cat", "dog")})
        rows = [(f"{s}/{c}/0.png", c) for s in ("train", "test") for c in ("cat", "dog")]
        self.csv(tmp_path, rows)
        assert self.read(tmp_path).rows == {"train": 2, "test": 2}
        self.csv(tmp_path, [("train/cat/0.png", "dog"), *rows[1:]])
        message = r"labels\.csv: 'train/cat/0\.png' is labelled 'dog', but lies in the folder of 'cat'"
        with pytest.raises(DataError, match=message):
            self.read(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("file,class\na,b", r"its header is \['file', 'class'\]; use filename,label"),
            ("filename,label\na,b,c", "line 2: 3 cells"),
            ("filename,label\na,b\n./a,c", "line 3: 'a' is labelled 'c' here and 'b' before"),
            ("filename,label\n ,b", "line 2: the file name is ' '"),
            ('filename,label\n"a,b', "line 2: not CSV"),
            ("filename,label\n", "names no files"),
            ("filename,label\na.png,b", "names no image below"),
        ],
    )
    def test_damaged_csv(self, tmp_path: Path, text: str, message: str) -> None:
        self.flat(tmp_path / "in")
        put(tmp_path / "in/labels.csv", text.encode())
        with pytest.raises(DataError, match=message):
            self.read(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"a": ', "not complete JSON"),
            ("3", "holds a int"),
            ('[{"file": 1}]', "item 0 is not an object with filename and label"),
            ('{"a": 1.5}', r"key 'a': the label of 'a' is 1\.5"),
        ],
    )
    def test_damaged_json(self, tmp_path: Path, text: str, message: str) -> None:
        self.flat(tmp_path / "in")
        put(tmp_path / "in/labels.json", text.encode())
        with pytest.raises(DataError, match=message):
            self.read(tmp_path, "labels.json")


class TestImageNetR:
    def test_layout(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in/imagenet-r", {f"n0000000{i}": 5 for i in range(4)})
        put(tmp_path / "in/imagenet-r/README.txt", b"words")
        reports = import_tasks(
            "imagenet_r", str(tmp_path / "in"), None, tmp_path / "out", options={"classes_per_task": 2}
        )
        assert [r.task.choices for r in reports] == [("n00000000", "n00000001"), ("n00000002", "n00000003")]
        assert [r.rows for r in reports] == [{"train": 8, "test": 2}] * 2
        assert reports[0].skipped == {"file is not at class/": 1}

    def test_another_folder(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {"n00000001": 1, "cats": 1})
        with pytest.raises(DataError, match="folder 'cats' is no WordNet id"):
            import_tasks("imagenet_r", str(tmp_path / "in"), None, tmp_path / "out")


class TestCub:
    classes = ("001.Albatross", "002.Auklet")

    def make(self, root: Path, **changed: str) -> None:
        names = [f"{c}/{c[4:]}_{i}.jpg" for c in self.classes for i in range(3)]
        for i, name in enumerate(names):
            put(root / "images" / name, encoded(noise(i, 8, 8), "JPEG"))
        files = {
            "images": "\n".join(f"{i} {name}" for i, name in enumerate(names, 1)),
            "classes": "\n".join(f"{i} {name}" for i, name in enumerate(self.classes, 1)),
            "image_class_labels": "\n".join(f"{i} {1 + (i > 3)}" for i in range(1, 7)),
            "train_test_split": "\n".join(f"{i} {int(i % 3 > 0)}" for i in range(1, 7)),
            **changed,
        }
        for name, text in files.items():
            put(root / f"{name}.txt", text.encode())

    def read(self, tmp_path: Path) -> ImportReport:
        return import_tasks("cub200", str(tmp_path / "in"), None, tmp_path / "out")[0]

    @pytest.mark.parametrize("folder", ["in", "in/CUB_200_2011"])
    def test_its_own_split(self, tmp_path: Path, folder: str) -> None:
        self.make(tmp_path / folder)
        report = self.read(tmp_path)
        assert (report.task.name, report.task.choices) == ("classes 001.Albatross and 002.Auklet", self.classes)
        assert [(row.id, row.label) for row in rows_of(report, "test")] == [
            ("001.Albatross/Albatross_2.jpg", "001.Albatross"),
            ("002.Auklet/Auklet_2.jpg", "002.Auklet"),
        ]
        assert report.rows == {"train": 4, "test": 2}

    def test_missing_image(self, tmp_path: Path) -> None:
        self.make(tmp_path / "in")
        (tmp_path / "in/images/001.Albatross/Albatross_0.jpg").unlink()
        report = self.read(tmp_path)
        assert report.skipped_rows == {"file is missing": ("images/001.Albatross/Albatross_0.jpg",)}

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (
                {"image_class_labels": "1 2\n2 1\n3 1\n4 2\n5 2\n6 2"},
                "Albatross_0.jpg' is labelled '002.Auklet', but lies",
            ),
            ({"image_class_labels": "1 7\n2 1\n3 1\n4 2\n5 2\n6 2"}, "image 1 has class 7, not in classes.txt"),
            ({"image_class_labels": "1 1"}, "image_class_labels.txt: image 2 is not in both this file and images.txt"),
            (
                {"train_test_split": "1 1\n2 0\n3 x\n4 1\n5 0\n6 0"},
                "train_test_split.txt: image 3 has 'x'; expected 0 or 1",
            ),
            ({"classes": "1 a b"}, "classes.txt: line 1: '1 a b' is not two words"),
            ({"classes": "1 a\n1 b"}, "classes.txt: line 2: number 1 is there twice"),
        ],
    )
    def test_text_files_that_do_not_fit(self, tmp_path: Path, changed: dict[str, str], message: str) -> None:
        self.make(tmp_path / "in", **changed)
        with pytest.raises(DataError) as caught:
            self.read(tmp_path)
        assert message in str(caught.value)


class TestCifar:
    names = ("apple", "bear", "cat", "dog")

    def make(self, root: Path, fine: tuple[int, ...] = (0, 1, 2, 3, 0, 3)) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        made = {}
        for split in ("train", "test"):
            records = rng.integers(0, 256, (len(fine), 3074), np.uint8)
            records[:, 1] = fine
            put(root / f"{split}.bin", records.tobytes())
            made[split] = records
        put(root / "fine_label_names.txt", ("\n".join(self.names) + "\n").encode())
        return made

    @pytest.mark.parametrize("folder", ["in", "in/cifar-100-binary"])
    def test_pixels_and_labels(self, tmp_path: Path, folder: str) -> None:
        made = self.make(tmp_path / folder)
        reports = import_tasks("cifar100", str(tmp_path / "in"), None, tmp_path / "out", options={"tasks": 2})
        assert [r.task.choices for r in reports] == [("apple", "bear"), ("cat", "dog")]
        for split in ("train", "test"):
            for row in (row for report in reports for row in rows_of(report, split)):
                record = made[split][int(row.id.removeprefix(f"{split}-"))]
                assert row.label == self.names[record[1]]
                found = np.asarray(decode(row.image))
                # The page's own words: 1024 bytes of red, then green, then blue, each row by row.
                for channel, y, x in ((0, 0, 0), (1, 0, 31), (2, 31, 0), (0, 17, 5)):
                    assert found[y, x, channel] == record[2 + 1024 * channel + 32 * y + x]
        assert [len(rows_of(report, "train")) for report in reports] == [3, 3]

    def test_a_label_beyond_the_names(self, tmp_path: Path) -> None:
        self.make(tmp_path / "in", (0, 1, 2, 3, 9))
        report = import_tasks("cifar100", str(tmp_path / "in"), None, tmp_path / "out", options={"tasks": 2})[0]
        assert report.skipped == {"label is outside the class names": 2}
        assert report.skipped_rows == {"label is outside the class names": ("train[4]", "test[4]")}

    def test_cut_short(self, tmp_path: Path) -> None:
        self.make(tmp_path / "in")
        path = tmp_path / "in/test.bin"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"test\.bin: is no whole number of 3074-byte records"):
            import_tasks("cifar100", str(tmp_path / "in"), None, tmp_path / "out")

    @pytest.mark.parametrize("folder", ["in", "in/cifar-100-python"])
    def test_the_pickled_version_is_refused_unread(self, tmp_path: Path, folder: str) -> None:
        for name in ("meta", "train", "test"):
            put(tmp_path / folder / name, b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(DataError, match=r"pickled and can run code; take cifar-100-binary\.tar\.gz"):
            import_tasks("cifar100", str(tmp_path / "in"), None, tmp_path / "out")
