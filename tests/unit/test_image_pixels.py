"""Pixel caches: pixels against Pillow's own, one file for all, and damage that is noticed."""

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.images import encoded, examples, meta, noise
from treelora.data import Task, open_task
from treelora.data.images import ImageExample, ImageRows, pixel_rows, write_images
from treelora.data.images import pixels as module
from treelora.data.images.pixels import fitted
from treelora.errors import ConfigError, DataError


def task_of(folder: Path, rows: list[ImageExample], choices: tuple[str, ...] = ("cat", "dog")) -> Task:
    for split in ("train", "test"):
        write_images(folder / f"{split}.parquet", rows, meta(split, choices))
    return open_task(folder)


class TestRows:
    def test_values(self, tmp_path: Path) -> None:
        rows = [ImageExample(f"r{i}", encoded(noise(i, 5, 3)), "dog" if i % 3 else "cat") for i in range(7)]
        found = pixel_rows(task_of(tmp_path / "t", rows), "train", 8, tmp_path / "c")
        assert (len(found), found.shape, found.truncated, found.skipped) == (7, (5, 3), 0, {})
        assert [found.row_id(i) for i in range(7)] == [f"r{i}" for i in range(7)]
        assert found.labels.tolist() == [0, 1, 1, 0, 1, 1, 0]
        assert (found.labels.dtype, found.lengths.dtype) == (np.int32, np.int64)
        assert found.lengths.tolist() == found.answer_lengths.tolist() == [1] * 7
        for i in range(7):
            assert np.array_equal(found.item(i), noise(i, 5, 3))
            assert found.label(i) == found.labels[i]
        assert np.array_equal(
            found.items(np.array([6, 2, 6])), np.stack([noise(6, 5, 3), noise(2, 5, 3), noise(6, 5, 3)])
        )
        for wrong in (-1, 7):
            with pytest.raises(IndexError, match=f"row {wrong} of 7"):
                found.item(wrong)

    def test_items_are_views_of_the_file_and_read_only(self, tmp_path: Path) -> None:
        found = pixel_rows(task_of(tmp_path / "t", examples(3)), "train", 8, tmp_path / "c")
        assert found.item(1).base is not None
        with pytest.raises(ValueError, match="read-only"):
            found.item(0)[0, 0, 0] = 1
        with pytest.raises(ValueError, match="read-only"):
            found.labels[0] = 1

    def test_labels_follow_the_order_of_the_choices(self, tmp_path: Path) -> None:
        task = task_of(tmp_path / "t", examples(4, choices=("cat", "dog")), ("dog", "cow", "cat"))
        assert pixel_rows(task, "test", 8, tmp_path / "c").labels.tolist() == [2, 0, 2, 0]

    def test_many_batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_BATCH_BYTES", 3 * 4 * 4 * 3 + 1)
        task = task_of(tmp_path / "t", examples(10))
        found = pixel_rows(task, "train", 8, tmp_path / "c")
        raw = found.path.read_bytes()
        batches = list(pa.ipc.open_stream(raw[:-32]))
        assert [batch.num_rows for batch in batches] == [3, 3, 3, 1]
        assert raw[-32:] == hashlib.sha256(raw[:-32]).digest()
        assert all(np.array_equal(found.item(i), noise(i)) for i in range(10))
        assert [found.row_id(i) for i in range(10)] == [f"img-{i}" for i in range(10)]


class TestGeometry:
    def test_small_images_of_one_size_stay(self, tmp_path: Path) -> None:
        task = task_of(tmp_path / "t", examples(2, height=6, width=8))
        assert pixel_rows(task, "train", 8, tmp_path / "c").shape == (6, 8)
        assert pixel_rows(task, "train", 7, tmp_path / "c").shape == (7, 7)

    def test_mixed_sizes_become_squares_as_pillow_makes_them(self, tmp_path: Path) -> None:
        sizes = [(20, 31), (40, 12), (16, 16), (9, 9)]
        rows = [ImageExample(str(i), encoded(noise(i, h, w)), "cat") for i, (h, w) in enumerate(sizes)]
        found = pixel_rows(task_of(tmp_path / "t", rows), "train", 10, tmp_path / "c")
        assert found.shape == (10, 10)
        # By hand: 31 * 10 / 20 = 15.5 -> 16 wide, 3 off the left; 40 * 10 / 12 = 33.3 -> 33 high, 11 off the top.
        for i, (resized, box) in enumerate(
            [((16, 10), (3, 0, 13, 10)), ((10, 33), (0, 11, 10, 21)), ((10, 10), None), ((10, 10), None)]
        ):
            want = Image.fromarray(noise(i, *sizes[i])).resize(resized, Image.Resampling.BICUBIC).crop(box)
            assert np.array_equal(found.item(i), np.asarray(want)), i

    def test_one_size_that_is_too_large(self, tmp_path: Path) -> None:
        task = task_of(tmp_path / "t", examples(2, height=12, width=12))
        assert pixel_rows(task, "train", 10, tmp_path / "c").shape == (10, 10)
        assert pixel_rows(task, "train", 12, tmp_path / "c").shape == (12, 12)

    @settings(max_examples=60, deadline=None)
    @given(width=st.integers(1, 60), height=st.integers(1, 60), side=st.integers(1, 40))
    def test_the_square_is_whole_and_in_the_middle(self, width: int, height: int, side: int) -> None:
        flat = np.full((height, width, 3), 77, np.uint8)
        made = np.asarray(fitted(Image.fromarray(flat), side))
        assert made.shape == (side, side, 3)
        assert (made == 77).all()

    def test_a_thread_of_pixels_does_not_grow_beyond_memory(self) -> None:
        thread = np.zeros((1, 100_000, 3), np.uint8)
        thread[:, 49_999:50_001] = 200
        made = np.asarray(fitted(Image.fromarray(thread), 224))
        assert made.shape == (224, 224, 3)
        assert (made == 200).all()

    def test_jpeg_through_the_whole_way(self, tmp_path: Path) -> None:
        data = encoded(noise(5, 30, 30), "JPEG")
        found = pixel_rows(task_of(tmp_path / "t", [ImageExample("a", data, "cat")]), "train", 32, tmp_path / "c")
        assert np.array_equal(found.item(0), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


class TestCache:
    def test_made_once_and_named_by_content(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        task = task_of(tmp_path / "t", examples(3))
        first = pixel_rows(task, "train", 8, tmp_path / "c")
        monkeypatch.setattr(module, "_make", lambda *_: pytest.fail("made again"))
        assert pixel_rows(task, "train", 8, tmp_path / "c").path == first.path
        monkeypatch.undo()
        keys = {first.key, pixel_rows(task, "train", 9, tmp_path / "c").key}
        keys.add(pixel_rows(task_of(tmp_path / "u", examples(3, start=1)), "train", 8, tmp_path / "c").key)
        assert len(keys) == 3
        assert not list((tmp_path / "c").glob("*.tmp"))

    def test_the_same_bytes_with_any_number_of_threads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        task = task_of(tmp_path / "t", examples(40, height=9, width=5))
        made = []
        for threads in (1, 7):
            monkeypatch.setattr("treelora.data.images.threads.thread_count", lambda threads=threads: threads)
            made.append(pixel_rows(task, "train", 4, tmp_path / str(threads)).path.read_bytes())
        assert made[0] == made[1]

    def test_damage_is_noticed_and_made_good(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        task = task_of(tmp_path / "t", examples(3))
        rows = pixel_rows(task, "train", 8, tmp_path / "c")
        path, whole = rows.path, rows.path.read_bytes()
        del rows
        for broken in (whole[:-1], b"", whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], whole + b"x"):
            path.unlink()
            path.write_bytes(broken)
            with pytest.raises(DataError, match=r"delete it"):
                ImageRows.open(path)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                again = pixel_rows(task, "train", 8, tmp_path / "c")
            assert "decoding again" in caplog.text
            assert np.array_equal(again.item(2), noise(2))
            assert path.read_bytes() == whole

    def test_another_format_is_not_taken_for_ours(self, tmp_path: Path) -> None:
        path = tmp_path / "x.arrow"
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, pa.schema([pa.field("a", pa.int32())])):
            pass
        body = bytes(sink.getvalue())
        path.write_bytes(body + hashlib.sha256(body).digest())
        with pytest.raises(DataError, match="can't be read as a cache"):
            ImageRows.open(path)

    def test_an_altered_split_leaves_no_cache(self, tmp_path: Path) -> None:
        task = task_of(tmp_path / "t", [*examples(2), ImageExample("bad", b"no image", "cat")])
        with pytest.raises(
            DataError, match=r"train\.parquet: row 'bad': image can't be decoded; import the task again"
        ):
            pixel_rows(task, "train", 8, tmp_path / "c")
        path = Path(task.path("test"))
        whole = path.read_bytes()
        at = whole.index(examples(1)[0].image) + 60
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(DataError, match="can't be read|checksum|can't be decoded"):  # noqa: RUF043
            pixel_rows(task, "test", 8, tmp_path / "c")
        assert list((tmp_path / "c").glob("*")) == []

    def test_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="image side is 0"):
            pixel_rows(task_of(tmp_path / "t", examples(2)), "train", 0, tmp_path)
        text = Task("t", "choice", ("a", "b"), "accuracy", {"train": "x"})
        with pytest.raises(DataError, match="kind 'choice'; only images have pixels"):
            pixel_rows(text, "train", 8, tmp_path)
