"""The parallel map's order, bounds and errors; and files that appear only when they are whole, on any store."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.support.images import examples, meta
from treelora.data import files
from treelora.data.images import ImageExample, read_images, write_images
from treelora.data.images.threads import ordered_map
from treelora.errors import DataError


class TestOrderedMap:
    def test_order_is_kept_whoever_ends_first(self) -> None:
        gate = threading.Event()

        def work(i: int) -> int:
            if i == 0:
                gate.wait(10)
            if i == 3:
                gate.set()
            return i * i

        assert list(ordered_map(work, range(50), 4)) == [i * i for i in range(50)]

    def test_work_runs_at_the_same_time(self) -> None:
        both = threading.Barrier(2, timeout=10)
        assert list(ordered_map(lambda i: both.wait() in (0, 1), range(4), 2)) == [True] * 4

    def test_it_never_runs_far_ahead(self) -> None:
        taken: list[int] = []

        def source() -> Iterator[int]:
            for i in range(1000):
                taken.append(i)
                yield i

        results = ordered_map(lambda i: i, source(), 3)
        assert [next(results) for _ in range(10)] == list(range(10))
        assert len(taken) <= 10 + 4 * 3
        results.close()
        assert len(taken) <= 10 + 4 * 3

    def test_errors_come_where_the_item_was(self) -> None:
        def work(i: int) -> int:
            if i == 5:
                raise ValueError("five")
            return i

        got: list[int] = []
        with pytest.raises(ValueError, match="five"):
            got.extend(ordered_map(work, range(100), 3))
        assert got == [0, 1, 2, 3, 4]
        assert list(ordered_map(work, [], 3)) == []


def test_a_store_gets_a_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store without renames, as S3 is: the file must not be opened there before it is complete."""
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    local = tmp_path / "here.parquet"
    write_images(local, examples(5), meta())
    with monkeypatch.context() as patch:
        patch.setattr(files, "resolve", lambda uri: (store, str(uri).removeprefix("store://")))
        with pytest.raises(DataError, match="'cow'"):
            write_images("store://there.parquet", [*examples(5), ImageExample("a", b"x", "cow")], meta())
        assert not (tmp_path / "there.parquet").exists()
        write_images("store://there.parquet", examples(5), meta())
    assert (tmp_path / "there.parquet").read_bytes() == local.read_bytes()
    assert list(read_images(tmp_path / "there.parquet")) == examples(5)
