"""The index of a stored folder: read as it was written, and refused in one message whatever else it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora.errors import CheckpointError
from treelora_platform.storage.index import Entry, Index, decode, is_stored, pieces, sha256

ENTRIES = st.dictionaries(
    st.sampled_from(("a", "b/c", "checkpoints/1/manifest.json")),
    st.builds(lambda data: Entry(len(data), (sha256(data),)), st.binary(min_size=1, max_size=4)),
)


@given(st.builds(Index, st.text(max_size=3), st.integers(0, 9), st.integers(0, 9), st.just("w"), ENTRIES))
def test_an_index_is_read_as_it_was_written(found: Index) -> None:
    assert decode(found.encode(), "here") == found


@given(st.builds(Index, st.just("l"), st.just(1), st.just(2), st.just("w"), ENTRIES), st.data())
def test_an_altered_index_is_refused(found: Index, data: st.DataObject) -> None:
    encoded = bytearray(found.encode())
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        assert decode(bytes(encoded), "here") == found  # a change of white space changes nothing
    except CheckpointError as error:
        assert str(error).startswith("here: ")  # noqa: PT017 - one of two outcomes


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@given(st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_index_or_our_error(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        decode(data, "here")


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../b", "a//b", "a\\b", ".stored.json", "ray/x", "a/.lock", "", "a\0"]
)
def test_no_index_reaches_out_of_its_folder(name: str) -> None:
    hostile = Index("l", 1, 1, "w", {name: Entry(1, (sha256(b"x"),))})
    with pytest.raises(CheckpointError, match="is no file below a folder"):
        decode(hostile.encode(), "here")


@pytest.mark.parametrize("entry", [Entry(-1, ()), Entry(1, ()), Entry(0, (sha256(b""),)), Entry(1, ("../../etc",))])
def test_no_index_names_impossible_blobs(entry: Entry) -> None:
    with pytest.raises(CheckpointError, match="not a whole index"):
        decode(Index("l", 1, 1, "w", {"a": entry}).encode(), "here")


def test_a_file_that_has_shrunk_is_not_stored_as_another(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12")
    with pytest.raises(OSError, match="is shorter than the 3 bytes"):
        list(pieces(tmp_path / "x", 3))


def test_what_is_not_of_a_runs_state_is_not_stored() -> None:
    names = ("run.json", "tables/steps/1-2.parquet", "adapters/0000-x/adapter_config.json", "rays/x")
    others = (".lock", "ray/x", "stalls/rank-0.txt", "tables/scores.tmp", "checkpoints/.writing-1/x", ".outgoing/a/0")
    assert [name for name in (*names, *others) if is_stored(name)] == list(names)
