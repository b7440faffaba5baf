"""What the terminal says of image tasks, and the counts behind it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.images import class_folders, encoded, examples, meta, noise, put
from treelora.data.images import ImageExample, write_images
from treelora.data.images.summary import describe_images
from treelora.errors import DataError
from treelora_platform.show import show_imports, show_tasks


def console() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_counts(tmp_path: Path) -> None:
    sizes = [(4, 6)] * 5 + [(3, 3)] * 2 + [(2, 2)] * 2 + [(1, 1), (9, 1)]
    rows = [ImageExample(str(i), encoded(noise(i, *size)), "ab"[i % 2]) for i, size in enumerate(sizes)]
    write_images(tmp_path / "train.parquet", rows, meta(choices="abc"))
    found = describe_images(str(tmp_path / "train.parquet"), 2)
    assert (found.images, found.classes, found.bytes) == (11, 2, sum(len(row.image) for row in rows))
    assert found.sizes == (((4, 6), 5), ((2, 2), 2), ((3, 3), 2))
    assert found.other_sizes == 2
    assert found.first == (("0", "a", len(rows[0].image)), ("1", "b", len(rows[1].image)))
    write_images(tmp_path / "bad.parquet", [*rows, ImageExample("odd", b"x", "a")], meta(choices="abc"))
    with pytest.raises(DataError, match=r"bad\.parquet: row 'odd': image can't be decoded"):
        describe_images(str(tmp_path / "bad.parquet"))


def test_import_and_show(tmp_path: Path) -> None:
    from treelora.data import import_tasks

    class_folders(tmp_path / "in", {f"{s}/{c}": 2 for s in ("train", "test") for c in ("cat", "dog")})
    put(tmp_path / "in/train/cat/bad.png", b"x")
    out = console()
    show_imports(import_tasks("image_folder", str(tmp_path / "in"), None, tmp_path / "o", options={"tasks": 1}), out)
    assert "train 4, test 4" in text_of(out)
    assert "1 image can't be decoded" in text_of(out)
    out = console()
    show_tasks(tmp_path / "o", 1, out)
    total = sum(len(path.read_bytes()) for path in (tmp_path / "in/test").rglob("*.png"))
    lines = text_of(out).splitlines()
    assert lines[0] == "classes cat and dog  image (class_incremental), accuracy; cat, dog"
    assert f"  test: 4 images of 2 classes, {total:,} bytes; pixels wide x high: 4 x 4: 4" in lines
    size = len((tmp_path / "in/test/cat/0.png").read_bytes())
    assert f"    test/cat/0.png ({size} bytes) -> 'cat'" in lines


def test_sizes_are_wide_x_high(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / f"{split}.parquet", examples(2, height=5, width=7), meta(split))
    out = console()
    show_tasks(tmp_path, 0, out)
    assert text_of(out).count("7 x 5: 2") == 2
