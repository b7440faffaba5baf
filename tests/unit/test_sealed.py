"""Cache files: the round trip, and what is found before it is parsed."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.loud import loud_column
from treelora.data.sealed import read_sealed, write_sealed
from treelora.errors import DataError

SCHEMA = pa.schema([pa.field("n", pa.int32(), nullable=False)])
BATCHES = [pa.record_batch([pa.array(values, pa.int32())], schema=SCHEMA) for values in ([1, 2], [3])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_sealed(tmp_path / "x.arrow", SCHEMA, iter(BATCHES), {"format": 1, "of": "numbers"})
    return tmp_path / "x.arrow"


def test_round_trip(path: Path) -> None:
    batches, info = read_sealed(path)
    assert [batch.column("n").to_pylist() for batch in batches] == [[1, 2], [3]]
    assert info == {"format": 1, "of": "numbers"}
    with pa.ipc.open_stream(path) as reader:  # any Arrow program reads it
        assert reader.read_all()["n"].to_pylist() == [1, 2, 3]


def test_every_flipped_byte_is_found(path: Path) -> None:
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match="checksum differs"):
            read_sealed(path)


@pytest.mark.parametrize("length", [0, 5, 31, 32, 40])
def test_every_cut_is_found(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"checksum differs|can't be read as a cache"):
        read_sealed(path)


@pytest.mark.parametrize("info", [b"", b"[]", b"{"])
def test_another_description(tmp_path: Path, info: bytes) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA.with_metadata({b"treelora.cache": info})):
        pass
    body = bytes(sink.getvalue())
    (tmp_path / "x").write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(DataError, match="can't be read as a cache"):
        read_sealed(tmp_path / "x")


def test_extension_types_are_refused_before_their_code_runs(tmp_path: Path) -> None:
    path = tmp_path / "loud.arrow"
    with loud_column() as (loud, ran):
        for column in (loud, pa.StructArray.from_arrays([loud], ["inner"])):
            batch = pa.record_batch([column], ["n"])
            write_sealed(path, batch.schema, [batch], {})
            ran.clear()
            with pytest.raises(DataError, match="extension types"):
                read_sealed(path)
            assert ran == []
            pa.ipc.open_stream(path).read_all()
            assert ran, "the file must be one that would have run code"
