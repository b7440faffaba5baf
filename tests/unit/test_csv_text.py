"""CSV files are read back as they were, and start no formula in a spreadsheet."""

import csv
import io

import pytest

from treelora_platform.csv_text import csv_text
from treelora_platform.sheets import Sheet, write_sheets


def rows(text):
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("value", ["=1+1", "@SUM(A1)", "-1+cmd|x", "+a", "\tx", "\rx"])
def test_what_a_spreadsheet_would_run_gets_an_apostrophe(value):
    assert rows(csv_text(["a"], [[value]])) == [["a"], [f"'{value}"]]
    assert rows(csv_text([value], []))[0] == [f"'{value}"]


@pytest.mark.parametrize("value", ["-1.5", "+3", "-1e-05", "plain", "a=b", 'a "quoted", text', "two\nlines"])
def test_numbers_and_texts_stay(value):
    assert rows(csv_text(["a", "b"], [[value, None]])) == [["a", "b"], [value, ""]]


def test_tables_on_disk_are_as_harmless(tmp_path):
    sheet = Sheet("runs", "Runs", ("name", "op"), (("=1+1", "50"),), [{"name": "=1+1", "op": 50.5, "steps": [1, 2]}])
    write_sheets(tmp_path, [sheet])
    assert rows((tmp_path / "runs.csv").read_bytes().decode()) == [["name", "op"], ["'=1+1", "50.5"]]
