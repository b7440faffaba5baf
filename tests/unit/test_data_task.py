"""Slugs, split files and streams: what is kept, and what is refused before it is used."""

import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.loud import loud_column
from treelora.data import Example, SplitMeta, Task, TaskStream, open_stream, open_task, slugify, write_split
from treelora.data.names import MAX_SLUG
from treelora.data.parquet import read_split
from treelora.errors import DataError

ROWS = [Example(f"r{i}", f"prompt {i}", ("yes", "no")[i % 2]) for i in range(6)]


def meta(name: str = "demo", split: str = "train", kind: str = "choice") -> SplitMeta:
    choices = ("yes", "no") if kind == "choice" else ()
    metric = "accuracy" if kind == "choice" else "rouge_l"
    return SplitMeta(name, kind, choices, metric, split, "test", "rule", "words", {"null": 2})  # type: ignore[arg-type]


def write_task(folder: Path, name: str = "demo") -> Task:
    for split in ("train", "test"):
        write_split(folder / f"{split}.parquet", ROWS, meta(name, split))
    return open_task(folder)


def raw_table(path: Path, table: pa.Table, description: dict[str, object] | None = None) -> Path:
    """A split file as somebody else might write it, without our checks or checksum."""
    described = meta().to_dict(table.num_rows) if description is None else description
    table = table.replace_schema_metadata({b"treelora.task": json.dumps(described).encode()})
    pq.write_table(table, path)
    return path


class TestSlug:
    @pytest.mark.parametrize(
        ("name", "slug"),
        [("SST-2", "sst-2"), ("20Minuten", "20minuten"), ("mood in colours", "mood-in-colours")],
    )
    def test_plain_names_stay_readable(self, name: str, slug: str) -> None:
        assert slugify(name) == slug

    @pytest.mark.parametrize(
        "name", ["../../etc", "a/b", "日本語", "", "..", "x" * 500, "caf\u00e9", "a\x00b", "\ud800"]
    )
    def test_lossy_names_carry_their_hash(self, name: str) -> None:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        assert slugify(name).endswith(f"-{digest}")

    @settings(deadline=None)
    @given(st.text())
    def test_always_a_safe_component(self, name: str) -> None:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slugify(name))
        assert len(slugify(name)) <= MAX_SLUG

    @settings(deadline=None)
    @given(st.text(max_size=8), st.text(max_size=8))
    def test_only_case_and_blanks_can_collide(self, one: str, two: str) -> None:
        def harmless(name: str) -> str:
            return re.sub("[ _]", "-", name).lower()

        if harmless(one) != harmless(two):
            assert slugify(one) != slugify(two)


class TestRoundTrip:
    def test_task_folder(self, tmp_path: Path) -> None:
        task = write_task(tmp_path / "demo")
        assert (task.name, task.kind, task.choices, task.metric) == (
            "demo",
            "choice",
            ("yes", "no"),
            "accuracy",
        )
        assert (task.family, task.vocabulary, list(task.splits)) == ("rule", "words", ["train", "test"])
        assert task.read("train") == [Example(r.id, r.prompt, r.answer, ("yes", "no")) for r in ROWS]

    def test_same_bytes_by_uri_and_on_every_write(self, tmp_path: Path) -> None:
        here = write_task(tmp_path / "demo")
        there = open_task(f"file://{tmp_path}/demo")
        again = write_task(tmp_path / "again")
        expected = hashlib.sha256((tmp_path / "demo" / "train.parquet").read_bytes()).hexdigest()
        assert [t.fingerprint("train") for t in (here, there, again)] == [expected] * 3
        assert there.read("train") == here.read("train")
        assert list((tmp_path / "demo").glob(".*")) == []

    def test_documented_schema(self, tmp_path: Path) -> None:
        write_task(tmp_path)
        schema = pq.read_schema(tmp_path / "train.parquet")
        assert schema.names == ["id", "prompt", "answer"]
        described = json.loads(schema.metadata[b"treelora.task"])
        described.pop("sha256")
        assert described == {
            "format": 1,
            "name": "demo",
            "slug": "demo",
            "kind": "choice",
            "choices": ["yes", "no"],
            "metric": "accuracy",
            "family": "rule",
            "vocabulary": "words",
            "source": "test",
            "split": "train",
            "rows": 6,
            "skipped": {"null": 2},
        }

    def test_choices_by_row(self, tmp_path: Path) -> None:
        rows = [Example("a", "p", "1", ("1", "2")), Example("b", "q", "yes")]
        write_split(tmp_path / "train.parquet", rows, meta())
        assert [r.choices for r in read_split(tmp_path / "train.parquet")[0]] == [("1", "2"), ("yes", "no")]

    def test_generation_has_no_choices(self, tmp_path: Path) -> None:
        write_split(tmp_path / "train.parquet", ROWS, meta(kind="generation"))
        assert {r.choices for r in read_split(tmp_path / "train.parquet")[0]} == {()}


class TestRefused:
    def test_rows_that_break_the_rules(self, tmp_path: Path) -> None:
        bad = {
            "no usable rows": [],
            "row 1: 'prompt' is blank": [ROWS[0], Example("x", " ", "no")],
            "row 1: id 'r0' is taken by row 0": [ROWS[0], ROWS[0]],
            "row 0: answer 'maybe' is not among the choices": [Example("x", "p", "maybe")],
            "UTF-8": [Example("x", "p\ud800", "no")],
        }
        for message, rows in bad.items():
            with pytest.raises(DataError, match=re.escape(message)):
                write_split(tmp_path / "train.parquet", rows, meta())
        assert list(tmp_path.iterdir()) == []

    def test_every_flipped_byte_changes_no_row(self, tmp_path: Path) -> None:
        good = tmp_path / "train.parquet"
        write_split(good, ROWS, meta())
        expected = read_split(good)
        payload = good.read_bytes()
        caught = 0
        for i in range(0, len(payload), 3):
            damaged = bytearray(payload)
            damaged[i] ^= 0x10
            (tmp_path / "x.parquet").write_bytes(damaged)
            try:
                rows, described = read_split(tmp_path / "x.parquet")
            except DataError:
                caught += 1
            else:
                # Bytes that no reader looks at, such as the first mark or spare statistics.
                assert rows == expected[0]
                assert described.choices == expected[1].choices
        assert caught > len(payload) // 6

    @pytest.mark.parametrize("keep", [0, 3, 11, 400])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "train.parquet"
        write_split(path, ROWS, meta())
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=re.escape(str(path))):
            read_split(path)

    def test_not_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "train.parquet"
        path.write_text("prompt,answer\nhello,yes\n")
        with pytest.raises(DataError, match=r"not a complete Parquet file"):
            read_split(path)

    def test_missing_and_wrong_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "train.parquet"
        raw_table(path, pa.table({"id": ["a"], "prompt": ["p"]}))
        with pytest.raises(DataError, match=r"column 'answer' is missing.*found \['id', 'prompt'\]"):
            read_split(path)
        raw_table(path, pa.table({"id": ["a"], "prompt": ["p"], "answer": [3]}))
        with pytest.raises(DataError, match=r"column 'answer' is int64, expected string"):
            read_split(path)
        raw_table(path, pa.table({"id": ["a"], "prompt": ["p"], "answer": ["yes"], "choices": ["yes"]}))
        with pytest.raises(DataError, match=r"column 'choices' is string, expected list<string>"):
            read_split(path)

    def test_null_and_broken_text_name_their_row(self, tmp_path: Path) -> None:
        path = tmp_path / "train.parquet"
        raw_table(path, pa.table({"id": ["a", "b"], "prompt": ["p", None], "answer": ["yes", "no"]}))
        with pytest.raises(DataError, match=r"row 1: 'prompt' is null"):
            read_split(path)
        broken = pa.array([b"p", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
        raw_table(path, pa.table({"id": ["a", "b"], "prompt": broken, "answer": ["yes", "no"]}))
        with pytest.raises(DataError, match=r"row 1: 'prompt' is not UTF-8"):
            read_split(path)

    def test_foreign_and_damaged_descriptions(self, tmp_path: Path) -> None:
        path = tmp_path / "train.parquet"
        table = pa.table({"id": ["a"], "prompt": ["p"], "answer": ["yes"]})
        pq.write_table(table, path)
        with pytest.raises(DataError, match=r"no 'treelora\.task' metadata"):
            read_split(path)
        whole = meta().to_dict(1)
        for key, value, message in (
            ("format", 2, "format 2"),
            ("kind", "video", "kind is 'video'"),
            ("metric", "bleu", "metric is 'bleu'"),
            ("choices", 7, "incomplete"),
        ):
            raw_table(path, table, {**whole, key: value})
            with pytest.raises(DataError, match=message):
                read_split(path)

    def test_extension_types_are_refused_before_their_code_runs(self, tmp_path: Path) -> None:
        with loud_column() as (loud, ran):
            nested = pa.StructArray.from_arrays([loud], ["inner"])
            for i, column in enumerate((loud, nested)):
                extra = pa.table({"id": ["a"], "prompt": ["p"], "answer": ["yes"], "extra": column})
                path = raw_table(tmp_path / f"{i}.parquet", extra)
                ran.clear()
                with pytest.raises(DataError, match="extension types"):
                    read_split(path)
                assert ran == []
                pq.read_schema(path)
                assert ran, "the file must be one that would have run code"


class TestFolders:
    def test_needs_train_and_test(self, tmp_path: Path) -> None:
        write_split(tmp_path / "train.parquet", ROWS, meta())
        with pytest.raises(DataError, match=r"no test\.parquet"):
            open_task(tmp_path)

    def test_splits_must_agree(self, tmp_path: Path) -> None:
        write_split(tmp_path / "train.parquet", ROWS, meta("one"))
        write_split(tmp_path / "test.parquet", ROWS, meta("two", "test"))
        with pytest.raises(DataError, match=r"test\.parquet says name 'two', train\.parquet 'one'"):
            open_task(tmp_path)

    def test_split_under_a_wrong_name(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            write_split(tmp_path / f"{split}.parquet", ROWS, meta(split="test"))
        with pytest.raises(DataError, match=r"its metadata says split 'test'"):
            open_task(tmp_path)

    def test_unknown_file_system_and_split(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no file system"):
            open_task("gopher://host/task")
        with pytest.raises(DataError, match=r"'demo' has no 'validation' split; it has train, test"):
            write_task(tmp_path).read("validation")


class TestStream:
    def task(self, name: str) -> Task:
        return Task(name, "generation", (), "rouge_l", {})

    def test_order_slices_and_growth(self) -> None:
        stream = TaskStream([self.task("a"), self.task("b")])
        longer = stream.extended(self.task("c"))
        assert (stream.names, longer.names, longer[1:].names) == (("a", "b"), ("a", "b", "c"), ("b", "c"))
        assert (len(longer), longer[-1].name, longer.index(self.task("b"))) == (3, "c", 1)

    def test_refuses_equal_names_and_slugs(self) -> None:
        with pytest.raises(DataError, match=r"'a' is twice"):
            TaskStream([self.task("a"), self.task("a")])
        with pytest.raises(DataError, match=r"'My Task' and 'my_task' share the folder 'my-task'"):
            TaskStream([self.task("My Task"), self.task("my_task")])

    def test_open_stream(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("one", "two"):
            write_task(tmp_path / name, name)
        assert open_stream(tmp_path, ["two", "one"]).names == ("two", "one")
        monkeypatch.chdir(tmp_path)
        assert open_task("one").path("test") == str(tmp_path / "one" / "test.parquet")
