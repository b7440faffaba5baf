"""A log outlives a kill at any byte."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora.errors import DataError
from treelora_platform.jsonl import JsonLog


@dataclass(frozen=True)
class Entry:
    number: int
    text: str = ""


class Numbers(JsonLog[Entry]):
    kind = Entry
    what = "a list of numbers"


def test_a_log_that_does_not_exist_is_empty_and_makes_its_folder(tmp_path):
    log = Numbers(tmp_path / "a" / "log.jsonl")
    assert log.entries() == []
    log.add(Entry(1, "é"))
    assert log.entries() == [Entry(1, "é")]


@given(cut=st.integers(0, 80))
def test_whatever_was_cut_off_the_rest_stays_and_grows(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log = Numbers(path)
    for number in (1, 2, 3):
        log.add(Entry(number))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    left = whole[:cut].count(b"\n")
    assert [entry.number for entry in log.entries()] == [1, 2, 3][:left]
    log.add(Entry(9))
    assert [entry.number for entry in log.entries()] == [*[1, 2, 3][:left], 9]


@pytest.mark.parametrize("text", ["[1]\n", "not JSON\n", '{"colour": 1}\n'])
def test_something_else_is_refused_by_name(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"log\.jsonl: is not a list of numbers .*; move it away"):
        Numbers(path).entries()
