"""Importers of images: each layout, what they skip and count, and what they refuse."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.images import class_folders, encoded, noise, put, tiff
from treelora.data import import_tasks
from treelora.data.images import ImageExample, decode, read_images
from treelora.data.sources import IMPORTERS, ImageSource, ImportReport, base_images
from treelora.errors import ConfigError, DataError

FOUR = {f"{split}/{label}": count for split, count in (("train", 3), ("test", 2)) for label in ("a", "b", "c", "d")}


def rows_of(report: ImportReport, split: str) -> list[ImageExample]:
    return list(read_images(report.task.path(split)))


def folder_import(tmp_path: Path, names: list[str] | None = None, **options: Any) -> list[ImportReport]:
    return import_tasks("image_folder", str(tmp_path / "in"), names, tmp_path / "out", options=options)


class TestDigits:
    def test_every_image_of_scikit_learn_once(self, tmp_path: Path) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        seen: set[int] = set()
        for number, report in enumerate(import_tasks("digits", "-", None, tmp_path)):
            assert report.task.choices == (str(2 * number), str(2 * number + 1))
            for split in ("train", "test"):
                for row in rows_of(report, split):
                    index = int(row.id.removeprefix("digit-"))
                    assert index not in seen
                    seen.add(index)
                    assert row.label == str(bunch.target[index])
                    grey = np.minimum(bunch.images[index] * 16, 255)
                    assert np.array_equal(np.asarray(decode(row.image)), np.repeat(grey[:, :, None], 3, 2))
        assert seen == set(range(1797))

    def test_share_and_seed(self, tmp_path: Path) -> None:
        from sklearn.datasets import load_digits

        counts = np.bincount(load_digits().target)
        ids = []
        for seed in (0, 1):
            reports = import_tasks("digits", "", None, tmp_path / str(seed), options={"split_seed": seed, "tasks": 5})
            want = [sum(round(0.3 * n) for n in counts[i : i + 2]) for i in range(0, 10, 2)]
            assert [report.rows["test"] for report in reports] == want
            ids.append({row.id for report in reports for row in rows_of(report, "test")})
        assert ids[0] != ids[1]

    def test_the_same_bytes_twice(self, tmp_path: Path) -> None:
        prints = []
        for name in ("one", "two"):
            reports = import_tasks("digits", "", None, tmp_path / name, options={"limit": 30, "class_seed": 3})
            prints.append([report.task.fingerprint(split) for report in reports for split in ("train", "test")])
        assert prints[0] == prints[1]

    def test_base_images_are_what_no_task_has(self, tmp_path: Path) -> None:
        options = {"base_classes": 4, "class_seed": 2}
        base = base_images("digits", "", tmp_path / "base", options=options)
        reports = import_tasks("digits", "", None, tmp_path / "tasks", options=options)
        assert (base.task.name, base.task.slug) == ("base classes", "base-classes")
        assert len(base.task.choices) == 4
        rest = [label for report in reports for label in report.task.choices]
        assert sorted([*base.task.choices, *rest]) == [str(i) for i in range(10)]
        ids = [row.id for r in (base, *reports) for split in ("train", "test") for row in rows_of(r, split)]
        assert len(ids) == len(set(ids)) == 1797
        with pytest.raises(DataError, match=r"0 base classes; set options\.base_classes"):
            base_images("digits", "", tmp_path / "none", options={})
        with pytest.raises(ConfigError, match="reads no images"):
            base_images("csv", "", tmp_path / "none", options={})


class TestFolders:
    def test_splits_and_classes(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {**FOUR, "val/a": 1, "val/c": 1})
        reports = folder_import(tmp_path, tasks=2, splits={"validation": "val"})
        assert [report.task.name for report in reports] == ["classes a and b", "classes c and d"]
        assert [report.rows for report in reports] == [{"train": 6, "validation": 1, "test": 4}] * 2
        first = rows_of(reports[0], "train")
        assert [(row.id, row.label) for row in first[:4]] == [
            ("train/a/0.png", "a"),
            ("train/a/1.png", "a"),
            ("train/a/2.png", "a"),
            ("train/b/0.png", "b"),
        ]
        for row in first:
            assert row.image == (tmp_path / "in" / row.id).read_bytes()
        meta = json.loads(pq.read_schema(reports[1].task.path("test")).metadata[b"treelora.task"])
        assert (meta["source"], meta["protocol"], meta["choices"]) == ("image_folder", "class_incremental", ["c", "d"])

    def test_classes_only_are_split_by_share(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", dict.fromkeys("abcd", 10))
        reports = folder_import(tmp_path, classes_per_task=2, test_share=0.3)
        assert [report.rows for report in reports] == [{"train": 14, "test": 6}] * 2
        again = import_tasks(
            "image_folder", f"file://{tmp_path}/in", None, tmp_path / "2", options={"tasks": 2, "test_share": 0.3}
        )
        assert [r.task.fingerprint("test") for r in again] == [r.task.fingerprint("test") for r in reports]

    def test_domains(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {f"{d}/{key}": 2 for d in ("photo", "sketch") for key in FOUR})
        options = {"layout": "domain/split/class", "protocol": "domain_incremental"}
        reports = folder_import(tmp_path, **options)
        assert [(r.task.name, r.task.choices, r.task.protocol) for r in reports] == [
            (name, ("a", "b", "c", "d"), "domain_incremental") for name in ("photo", "sketch")
        ]
        assert all(row.id.startswith("sketch/") for row in rows_of(reports[1], "train"))
        assert [r.rows for r in reports] == [{"train": 8, "test": 8}] * 2
        merged = import_tasks(
            "image_folder",
            str(tmp_path / "in"),
            None,
            tmp_path / "2",
            options={**options, "protocol": None, "tasks": 1},
        )
        assert merged[0].rows == {"train": 16, "test": 16}

    def test_domains_without_splits(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {f"{d}/{label}": 5 for d in ("x", "y") for label in "ab"})
        reports = folder_import(tmp_path, layout="domain/class", protocol="domain_incremental")
        assert [report.rows for report in reports] == [{"train": 8, "test": 2}] * 2

    def test_a_domain_of_test_alone_is_counted(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {f"photo/{key}": 2 for key in FOUR} | {"sketch/test/a": 3})
        options = {"layout": "domain/split/class", "protocol": "domain_incremental"}
        (report,) = folder_import(tmp_path, **options)
        assert (report.rows, report.skipped) == ({"train": 8, "test": 8}, {"domain is not in training": 3})
        class_folders(tmp_path / "in", {"sketch/train/a": 1})
        assert folder_import(tmp_path, ["photo"], **options)[0].skipped == {}
        assert folder_import(tmp_path, **options)[1].rows == {"train": 1, "test": 3}

    def test_names_choose_and_order(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", FOUR)
        reports = folder_import(tmp_path, ["classes c and d"], tasks=2)
        assert [(r.task.name, r.skipped) for r in reports] == [("classes c and d", {})]
        with pytest.raises(DataError, match="no task 'classes a'; there are classes a and b; classes c and d"):
            folder_import(tmp_path, ["classes a"], tasks=2)

    def test_limit_is_balanced_and_counts_usable_images(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {"train/a": 9, "train/b": 2, "test/a": 9, "test/b": 9})
        put(tmp_path / "in/test/a/0.png", b"broken")
        (report,) = folder_import(tmp_path, tasks=1, limit=6)
        assert [row.id for row in rows_of(report, "train")] == [
            *(f"train/a/{i}.png" for i in range(4)),
            *(f"train/b/{i}.png" for i in range(2)),
        ]
        assert [row.id for row in rows_of(report, "test")] == [
            *(f"test/a/{i}.png" for i in (1, 2, 3)),
            *(f"test/b/{i}.png" for i in range(3)),
        ]

    def test_leftovers_go_and_other_tasks_stay(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {**FOUR, "validation/a": 1, "validation/d": 1})
        assert [set(r.task.splits) for r in folder_import(tmp_path, tasks=2)] == [{"train", "validation", "test"}] * 2
        for label in "ad":
            (tmp_path / f"in/validation/{label}/0.png").unlink()
        assert [set(r.task.splits) for r in folder_import(tmp_path, tasks=2)] == [{"train", "test"}] * 2
        folder = tmp_path / "out" / folder_import(tmp_path, tasks=2)[0].task.slug
        os.rename(folder, tmp_path / "out" / "base-classes")
        with pytest.raises(DataError, match="holds task 'classes a and b'; import 'base classes' elsewhere"):
            base_images("image_folder", str(tmp_path / "in"), tmp_path / "out", options={"base_classes": 2, "tasks": 1})


class TestSkipped:
    def test_each_reason_is_counted_and_named(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", FOUR)
        train = tmp_path / "in/train"
        put(train / "a/bad1.jpg", b"\xff\xd8\xff no jpeg")
        put(train / "a/bad2.png", encoded(noise(1, 30, 30))[:500])
        put(train / "a/none.png", b"")
        put(train / "b/five.tif", tiff(5, [0, 0]))
        put(train / "b/two.tif", tiff(2, [0], 1))
        put(train / "b/notes.txt", b"hello")
        put(train / "stray.png", encoded(noise(2)))
        put(tmp_path / "in/test/new/0.png", encoded(noise(3)))
        put(train / "c/.hidden.png", b"not looked at")
        put(train / "d/fine.PNG", encoded(noise(4)))
        one, two = folder_import(tmp_path, tasks=2)
        assert one.skipped == {
            "image can't be decoded": 2,
            "image is empty": 1,
            "image has 5 channels": 1,
            "image has 2 channels": 1,
            "file is not an image by its name": 1,
            "file is not at split/class/": 1,
            "class is not in training": 1,
        }
        assert one.skipped_rows["image can't be decoded"] == ("train/a/bad1.jpg", "train/a/bad2.png")
        assert one.skipped_rows["class is not in training"] == ("test/new/0.png",)
        assert (two.skipped, two.rows) == ({}, {"train": 7, "test": 4})
        kept = json.loads(pq.read_schema(one.task.path("test")).metadata[b"treelora.task"])
        assert (kept["skipped"], kept["rows"]) == ({"class is not in training": 1}, 4)

    def test_the_first_five_are_named(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", FOUR)
        for i in range(8):
            put(tmp_path / f"in/train/a/bad{i}.png", b"x")
        report = folder_import(tmp_path, tasks=2)[0]
        assert report.skipped == {"image can't be decoded": 8}
        assert report.skipped_rows["image can't be decoded"] == tuple(f"train/a/bad{i}.png" for i in range(5))

    def test_a_chosen_task_answers_for_its_own_rows(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", FOUR)
        put(tmp_path / "in/train/a/bad.png", b"x")
        assert folder_import(tmp_path, ["classes c and d"], tasks=2)[0].skipped == {}

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", FOUR)
        target = os.fsencode(tmp_path / "in/train/a") + b"/\xff.png"
        with open(target, "wb") as file:
            file.write(encoded(noise(1)))
        with pytest.raises(
            DataError, match=r"in: a file name below it is not UTF-8: b'.*/train/a/\\xff\.png'; rename it"
        ):
            folder_import(tmp_path, tasks=2)


class TestRefused:
    def test_splits_without_a_usable_image(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {key: count for key, count in FOUR.items() if key != "test/a"})
        put(tmp_path / "in/test/a/0.png", b"x")
        assert folder_import(tmp_path, tasks=2)[0].skipped == {"image can't be decoded": 1}
        for i in range(2):
            put(tmp_path / f"in/test/b/{i}.png", b"x")
        message = r"task 'classes a and b' has no usable images in its test split \(image can't be decoded: 3\)"
        with pytest.raises(DataError, match=message):
            import_tasks("image_folder", str(tmp_path / "in"), None, tmp_path / "2", options={"tasks": 2})
        assert not list((tmp_path / "2").rglob("*.parquet"))
        assert not list((tmp_path / "2").rglob("*.tmp"))

    def test_a_class_whose_training_images_are_all_broken(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", FOUR)
        for i in range(3):
            put(tmp_path / f"in/train/d/{i}.png", b"x")
        with pytest.raises(DataError, match="class 'd' of task 'classes c and d' has no usable training image"):
            folder_import(tmp_path, tasks=2)

    def test_classes_that_have_nothing_in_common(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", {"train/a": 1, "train/b": 1, "test/x": 1, "test/y": 1})
        with pytest.raises(DataError, match="no class of test is in training: 'x', 'y' against 'a', 'b'"):
            folder_import(tmp_path, tasks=1)

    def test_one_class_tasks(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", FOUR)
        with pytest.raises(DataError, match=r"in: 4 classes in 4 tasks leave a task with the single class 'a'"):
            folder_import(tmp_path, tasks=4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layout": "class/split"}, r"options\.layout is 'class/split'; use one of split/class, class, domain"),
            ({"layout": "split/class", "test_share": 0.5}, "has splits of its own"),
            (
                {"layout": "domain/class", "test_share": 1.5},
                r"options\.test_share is 1\.5; use a number between 0 and 1",
            ),
            ({"layout": "domain/class", "splits": {"test": "val"}}, r"options\.splits needs folders for splits"),
            ({"splits": "val"}, r"options\.splits is 'val'; use a mapping of our splits to the source's"),
            ({"columns": {}}, r"importer 'image_folder' has no option \['columns'\]"),
            ({"limit": 0}, "limit is 0"),
            ({"labels": "l.csv", "layout": "class"}, "don't go together"),
        ],
    )
    def test_options(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        class_folders(tmp_path / "in", FOUR)
        with pytest.raises(ConfigError, match=message):
            folder_import(tmp_path, **{"tasks": 2, **options})

    def test_layouts_that_fit_nothing(self, tmp_path: Path) -> None:
        class_folders(tmp_path / "in", FOUR)
        with pytest.raises(DataError, match=r"no file lies at domain/split/class/; choose options\.layout from"):
            folder_import(tmp_path, layout="domain/split/class", tasks=2)
        with pytest.raises(DataError, match=r"no test split \(final\)"):
            folder_import(tmp_path, splits={"test": "final"}, tasks=2)

    @pytest.mark.parametrize(
        "source",
        [name for name, importer in IMPORTERS.items() if isinstance(importer, ImageSource) and name != "digits"],
    )
    def test_empty_and_missing_folders(self, tmp_path: Path, source: str) -> None:
        (tmp_path / "in").mkdir()
        for path in (tmp_path / "in", tmp_path / "nowhere"):
            with pytest.raises(DataError, match=path.name):
                import_tasks(source, str(path), None, tmp_path / "out", options={"tasks": 2})
        assert not (tmp_path / "out").exists()
