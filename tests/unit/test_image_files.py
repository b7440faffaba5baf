"""Split files of images: the round trip, same bytes twice, and what a hostile file can't do."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.images import encoded, examples, meta, noise
from tests.support.loud import loud_column
from treelora.data import open_task
from treelora.data.images import ImageExample, read_images, write_images
from treelora.data.images.files import ImageWriter
from treelora.data.parquet import read_meta
from treelora.data.schema import SplitMeta
from treelora.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda text: text.strip() != "")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.parquet"


def raw(path: Path, columns: dict[str, Any], description: dict[str, Any] | None = None) -> None:
    whole = meta().to_dict(1) if description is None else description
    table = pa.table(columns).replace_schema_metadata({"treelora.task": json.dumps(whole)})
    pq.write_table(table, path)


class TestRoundTrip:
    @settings(max_examples=40, deadline=None)
    @given(
        ids=st.lists(TEXT, min_size=1, max_size=12, unique=True),
        choices=st.lists(TEXT, min_size=1, max_size=4, unique=True),
        data=st.data(),
    )
    def test_rows_come_back(self, tmp_path_factory: pytest.TempPathFactory, ids, choices, data) -> None:
        path = tmp_path_factory.mktemp("trip") / "test.parquet"
        rows = [
            ImageExample(i, data.draw(st.binary(min_size=1, max_size=40)), data.draw(st.sampled_from(choices)))
            for i in ids
        ]
        write_images(path, iter(rows), meta("test", choices))
        assert list(read_images(path)) == rows
        assert read_meta(path) == (meta("test", choices), len(rows))

    def test_the_same_rows_give_the_same_bytes(self, tmp_path: Path) -> None:
        prints = []
        for name in ("one", "two"):
            write_images(tmp_path / name, examples(30), meta(skipped={"b": 1, "a": 2}))
            prints.append((tmp_path / name).read_bytes())
        assert prints[0] == prints[1]

    def test_row_groups_follow_the_bytes_and_change_nothing(self, path: Path) -> None:
        rows = [ImageExample(str(i), bytes([i]) * 100, "cat") for i in range(10)]
        with path.open("wb") as sink, ImageWriter(sink, str(path), ("cat", "dog"), piece_bytes=250) as writer:
            for row in rows:
                writer.add(row)
            writer.finish(meta())
        file = pq.ParquetFile(path)
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 3, 1]
        assert file.schema_arrow.field("image").type == pa.binary()
        assert list(read_images(path)) == rows

    def test_reading_holds_a_row_group_and_not_the_file(self, path: Path) -> None:
        size = 100_000
        rows = (ImageExample(str(i), i.to_bytes(2) * (size // 2), "cat") for i in range(80))
        with path.open("wb") as sink, ImageWriter(sink, str(path), ("cat", "dog"), piece_bytes=4 * size) as writer:
            for row in rows:
                writer.add(row)
            writer.finish(meta())
        before = pa.total_allocated_bytes()
        held = [pa.total_allocated_bytes() - before for _ in read_images(path)]
        assert len(held) == 80
        assert max(held) < 20 * size

    def test_the_digest_is_that_of_rows_then_description(self, path: Path) -> None:
        rows = examples(3)
        write_images(path, rows, meta())
        kept = json.loads(pq.read_schema(path).metadata[b"treelora.task"])
        sha = hashlib.sha256()
        for row in rows:
            sha.update(json.dumps([row.id, row.label, len(row.image)]).encode() + row.image)
        found = kept.pop("sha256")
        sha.update(json.dumps(kept, sort_keys=True).encode())
        assert found == sha.hexdigest()
        assert (kept["rows"], kept["protocol"], kept["kind"]) == (3, "class_incremental", "image")

    def test_open_task(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            write_images(tmp_path / f"{split}.parquet", examples(4), meta(split))
        task = open_task(tmp_path)
        assert (task.kind, task.protocol, task.choices) == ("image", "class_incremental", ("cat", "dog"))
        with pytest.raises(DataError, match="holds images; read them with read_images"):
            task.read("train")
        write_images(tmp_path / "test.parquet", examples(4), meta("test", protocol="task_incremental"))
        with pytest.raises(DataError, match=r"says protocol 'task_incremental', train\.parquet 'class_incremental'"):
            open_task(tmp_path)


class TestSchema:
    def test_text_has_no_protocol_in_its_description(self) -> None:
        text = SplitMeta("t", "choice", ("a", "b"), "accuracy", "test", "s")
        assert "protocol" not in text.to_dict(1)
        assert SplitMeta.from_dict(text.to_dict(1)) == text

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"protocol": None},
                "protocol is None; use one of class_incremental, domain_incremental, task_incremental",
            ),
            ({"protocol": "online"}, "protocol is 'online'"),
            ({"metric": "rouge_l"}, "images are judged by accuracy"),
            ({"choices": ()}, "choices are empty"),
            ({"kind": "choice"}, "protocol 'class_incremental' is for images"),
        ],
    )
    def test_images_have_one(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            replace(meta(), **fields)


class TestWriteRefuses:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (ImageExample("img-0", b"x", "cat"), "row 2: id 'img-0' is taken by row 0"),
            (ImageExample(" ", b"x", "cat"), "row 2: 'id' is blank"),
            (ImageExample("a", b"", "cat"), "row 2: 'image' is empty"),
            (ImageExample("a", b"x", "cow"), "row 2: label 'cow' is not among the 2 choices"),
            (ImageExample("\ud83d", b"x", "cat"), "row 2: 'id' can't be held by UTF-8"),
        ],
    )
    def test_rows(self, path: Path, row: ImageExample, message: str) -> None:
        with pytest.raises(DataError, match=message):
            write_images(path, [*examples(2), row], meta())
        assert list(path.parent.iterdir()) == []

    def test_no_rows_and_a_failing_source(self, path: Path) -> None:
        def broken() -> Any:
            yield from examples(2)
            raise OSError("disk gone")

        with pytest.raises(DataError, match="has no usable images in its train split"):
            write_images(path, [], meta())
        with pytest.raises(OSError, match="disk gone"):
            write_images(path, broken(), meta())
        assert list(path.parent.iterdir()) == []

    def test_an_old_file_stays_until_the_new_one_is_whole(self, path: Path) -> None:
        write_images(path, examples(2), meta())
        before = path.read_bytes()
        with pytest.raises(DataError, match="'cow'"):
            write_images(path, [*examples(3), ImageExample("a", b"x", "cow")], meta())
        assert path.read_bytes() == before


GOOD: dict[str, Any] = {"id": ["a"], "image": [b"x"], "label": ["cat"]}


class TestReadRefuses:
    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"image": None}, r"column 'image' is missing \(or there twice\); found \['id', 'label'\]"),
            ({"image": ["x"]}, "column 'image' is string, expected binary"),
            ({"label": [3]}, "column 'label' is int64, expected string"),
            ({"image": pa.array([None], pa.binary())}, "row 0: 'image' is null"),
            ({"id": pa.array([None], pa.string())}, "row 0: 'id' is null"),
            ({"image": [b""]}, "row 0: 'image' is empty"),
            ({"label": ["cow"]}, "row 0: label 'cow' is not among"),
            ({"label": pa.array([b"\xff"]).view(pa.string())}, "row 0: 'label' is not UTF-8"),
            ({"id": ["a", "a"], "image": [b"x", b"y"], "label": ["cat", "cat"]}, "row 1: id 'a' is taken by row 0"),
        ],
    )
    def test_columns_and_cells(self, path: Path, columns: dict[str, Any], message: str) -> None:
        raw(path, {key: value for key, value in {**GOOD, **columns}.items() if value is not None})
        with pytest.raises(DataError, match=message) as caught:
            list(read_images(path))
        assert str(path) in str(caught.value)

    def test_foreign_and_text_files(self, path: Path) -> None:
        pq.write_table(pa.table(GOOD), path)
        with pytest.raises(DataError, match=r"no 'treelora\.task' metadata"):
            list(read_images(path))
        text = SplitMeta("t", "choice", ("cat", "dog"), "accuracy", "train", "s")
        raw(path, GOOD, text.to_dict(1))
        with pytest.raises(DataError, match="kind 'choice', not images"):
            list(read_images(path))
        empty = pa.table(GOOD).slice(0, 0)
        raw(path, {key: empty[key] for key in GOOD}, meta().to_dict(0))
        with pytest.raises(DataError, match="task 'pets' is empty"):
            list(read_images(path))

    def test_another_image_under_the_same_description(self, path: Path) -> None:
        rows = examples(2)
        write_images(path, rows, meta())
        kept = json.loads(pq.read_schema(path).metadata[b"treelora.task"])
        swapped = [rows[0].image, encoded(noise(99))]
        raw(path, {"id": [row.id for row in rows], "image": swapped, "label": [row.label for row in rows]}, kept)
        with pytest.raises(DataError, match="content differs from its checksum"):
            list(read_images(path))

    def test_every_flipped_byte_and_every_cut_is_found(self, path: Path) -> None:
        write_images(path, examples(3), meta())
        whole = path.read_bytes()
        want = list(read_images(path)), read_meta(path)
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            try:
                found = list(read_images(path)), read_meta(path)
            except DataError:
                continue
            assert found == want, f"byte {place}"
        for cut in range(0, len(whole), 41):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError):
                list(read_images(path))

    def test_extension_types_are_refused_before_their_code_runs(self, path: Path) -> None:
        with loud_column() as (loud, ran):
            raw(path, {**GOOD, "image": loud})
            ran.clear()
            with pytest.raises(DataError, match="holds Arrow extension types"):
                list(read_images(path))
            assert ran == []
