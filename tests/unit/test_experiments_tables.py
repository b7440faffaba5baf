import io

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.support.records import record
from treelora_platform.experiments.analysis import compare_groups
from treelora_platform.experiments.groups import select
from treelora_platform.experiments.tables import rows_table, sheets_of, show_p
from treelora_platform.sheets import markdown, render, write_sheets

RUNS = [
    record("treelora", "a, b", 0, 56.0, bwt=3.0, seconds=10.0, name="t0", lora__rank=8, tags={"version.commit": "c"}),
    record("treelora", "a, b", 1, 58.0, bwt=5.0, seconds=12.0, name="t1", lora__rank=8),
    record("sequential", "a, b", 0, 50.0, bwt=9.0, seconds=10.0, name="s0", lora__rank=8),
    record("sequential", "a, b", 1, 51.0, bwt=8.0, seconds=10.0, name="s1", lora__rank=8),
    record("joint", "a, b", 0, {"last": 70.0, "routed": 71.0}, name="j", lora__rank=8),
]


def compared(by=("method",)):
    return compare_groups("exp", select(RUNS, by))


def test_standings_for_people():
    sheet = sheets_of(compared())[0]
    assert sheet.title == "exp: means by method"
    assert sheet.columns == (
        "group", "inference", "runs", "OP (%)", "BWT (points)", "training (s)", "tokens/s", "stored",
    )  # fmt: skip
    assert sheet.cells == (
        ("joint (bound)", "last", "1", "70.0", "–", "–", "–", "–"),
        ("sequential", "last", "2", "50.5 [50.0, 51.0]", "8.5 [8.0, 9.0]", "10 [10, 10]", "–", "–"),
        ("treelora", "last", "2", "57.0 [56.0, 58.0]", "4.0 [3.0, 5.0]", "11 [10, 12]", "–", "–"),
        (),
        ("joint (bound)", "routed", "1", "71.0", "–", "–", "–", "–"),
    )


def test_differences_for_people():
    sheet = sheets_of(compared())[1]
    op = [row for row in sheet.cells if row and row[2] == "OP"]
    # 6 and 7 less nothing in common: 6.5 +- 12.7 x sqrt(0.5) / sqrt(2); (2.8 x 0.7071 / 6.5)^2 + 2 = 2.09
    assert op == [
        ("joint", "last", "OP", "1", "+20.0", "–", "1", "1", "1", "–"),
        ("treelora", "last", "OP", "2", "+6.5 [6.0, 7.0]", "[0.1, 12.9]", "0.5", "0.5", "1", "3"),
    ]
    assert sheet.notes[-2:] == (
        "with 2 pairs and 1 comparison no p (Holm) can be below 0.5; it takes 6 pairs at least to get to 0.05",
        "with 2 pairs and 2 comparisons no p (Holm) can be below 1; it takes 7 pairs at least to get to 0.05",
    )


def test_a_narrow_terminal_does_without_some_columns():
    sheet = sheets_of(compared())[1]
    whole = (8 + 9 + 12 + 5 + 17 + 15 + 3 + 7 + 8 + 12) + 3 * 9 + 2  # between any two two spaces and a line
    assert len(render(sheet, whole).columns) == len(render(sheet).columns) == 10
    assert [str(column.header) for column in render(sheet, whole - 1).columns] == [
        "group", "inference", "score", "pairs", "difference", "95 % t interval", "p", "p (Holm)", "pairs needed",
    ]  # fmt: skip
    narrow = render(sheet, 80)
    assert [str(column.header) for column in narrow.columns][4:] == ["difference", "p (Holm)"]
    assert "for want of room: least p, pairs needed, 95 % t interval, p; the files have them" in narrow.caption
    console = Console(file=io.StringIO(), width=80)
    console.print(narrow)
    assert "│treelora │ last      │ OP" in console.file.getvalue()
    assert "…" not in console.file.getvalue()


def test_files_hold_what_people_see(tmp_path):
    sheets = sheets_of(compared())
    paths = write_sheets(tmp_path, sheets)
    assert [path.name for path in paths] == [
        "standings.parquet", "standings.csv", "differences.parquet", "differences.csv",
    ]  # fmt: skip
    rows = pq.read_table(tmp_path / "standings.parquet").to_pylist()
    mine = next(row for row in rows if row["group"] == "treelora")
    assert (mine["op_n"], mine["op_t"], mine["op_bootstrap_low"], mine["seconds_t"]) == (2, 57.0, 56.0, 11.0)
    assert next(row for row in rows if row["group"] == "joint")["bwt_t"] is None
    differences = pyarrow.csv.read_csv(tmp_path / "differences.csv").to_pylist()
    found = next(row for row in differences if (row["group"], row["metric"]) == ("treelora", "op"))
    assert (found["found_t"], found["found_p"], found["corrected_p"], found["reference"]) == (
        6.5,
        0.5,
        1.0,
        "sequential",
    )


def test_rows_are_all_runs_in_all_ways_of_inference():
    table = rows_table(compared(["method", "lora.rank", "seed"]))
    rows = table.to_pylist()
    assert table.column_names[:5] == ["lora.rank", "group", "method", "mode", "order"]
    assert [(r["run"], r["mode"], r["op"]) for r in rows] == [
        ("j", "last", 70.0), ("j", "routed", 71.0), ("s0", "last", 50.0), ("s1", "last", 51.0), ("t0", "last", 56.0),
        ("t1", "last", 58.0),
    ]  # fmt: skip
    last = rows[4]
    assert (last["lora.rank"], last["seed"], last["order"], last["commit"]) == ("8", 0, "a, b", "c")
    assert last["started"].timestamp() * 1000 == RUNS[0].start_unix_ms
    assert (last["seconds"], last["tokens"], last["stored_bytes"]) == (10.0, 1000, None)


def test_common_tasks_have_a_table():
    runs = [record("ewc", "a, b", s, tasks={"a": 40.0, "b": 1.0}) for s in (0, 1)]
    runs += [record("gem", "a, c", tasks={"a": 45.5, "c": 1.0})]
    sheet = sheets_of(compare_groups("exp", select(runs, ["method"])))[-1]
    assert sheet.title == "exp: last scores on a"
    assert sheet.cells == (("ewc", "last", "2", "2", "40.0 [40.0, 40.0]"), ("gem", "last", "2", "1", "45.5"))


def test_terminal_and_markdown_show_the_same_cells():
    sheets = sheets_of(compared())
    out = io.StringIO()
    for sheet in sheets:
        Console(file=out, width=200).print(render(sheet))
    page = markdown(sheets, "exp", compared().remarks)
    for sheet in sheets:
        for cell in {cell for row in sheet.cells for cell in row}:
            assert cell in out.getvalue()
            assert f"| {cell} |" in page
    assert "- Pairs with sequential, which agree in data_hash, seed: joint 1 (of 1 run), treelora 2 (of 2 runs)" in page


@pytest.mark.parametrize(("p", "text"), [(1.0, "1"), (0.03125, "0.0312"), (0.00012, "0.00012"), (9.9e-6, "< 0.0001")])
def test_p_values(p, text):
    assert show_p(p) == text
