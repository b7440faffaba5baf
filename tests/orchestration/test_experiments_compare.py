"""`treelora compare` on a real MLflow store."""

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.orchestration.test_tracking import Server
from tests.support.latex import read_tabulars
from tests.support.mlflow_runs import add_run, final_metrics, run_tags
from tests.support.run_dir import finished_run
from treelora.errors import DataError
from treelora_platform.experiments.compare import compare
from treelora_platform.tracking import TrackingError

OP = {"sequential": (50.0, 54.0, 40.0), "treelora": (56.0, 57.0, 49.0)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two methods, three seeds, and what must not count."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    for method, values in OP.items():
        for seed, op in enumerate(values):
            params = {"method": method, "seed": seed, "lora.rank": 8}
            add_run(
                uri, "methods", f"{method}-{seed}", params, run_tags(method, ["a", "b"], seed), final_metrics(op, 5.0)
            )
    add_run(uri, "methods", "dead", {"method": "ewc"}, run_tags("ewc", ["a", "b"]), status="FAILED")
    add_run(uri, "methods", "short", {"method": "ewc"}, run_tags("ewc", ["a"]), final_metrics(99.0, 0.0))
    add_run(uri, "methods", "sweep", tags={"treelora.kind": "sweep"})
    add_run(uri, "scoreless", "one", {"method": "ewc"}, run_tags("ewc", ["a"]), {"loss": 1.0})
    return uri


def run(store, out, target="methods", other=None, by=(), filters=(), reference=None, html=False):
    console = Console(record=True, width=220)
    page = compare(target, other, list(by), list(filters), reference, out, store, console, html)
    return page, console.export_text()


def test_an_experiment_becomes_tables(tmp_path, store):
    page, shown = run(store, tmp_path / "out")
    assert page == tmp_path / "out" / "comparison.md"
    assert {path.name for path in page.parent.iterdir()} == {
        "rows.parquet", "rows.csv", "standings.parquet", "standings.csv", "differences.parquet", "differences.csv",
        "comparison.md", "comparison.tex",
    }  # fmt: skip
    rows = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    assert {(row["method"], row["seed"]): row["op"] for row in rows} == {
        (method, seed): op for method, values in OP.items() for seed, op in enumerate(values)
    }
    found = pq.read_table(tmp_path / "out" / "differences.parquet").to_pylist()
    assert [(row["found_t"], row["found_pairs"]) for row in found if row["metric"] == "op"] == [(6.0, 3)]
    assert "| treelora | last | OP | 3 | +6.0 [3.0, 9.0] | [-1.5, 13.5] | 0.25 | 0.25 | 0.25 | 4 |" in page.read_text()
    standings, _ = read_tabulars((tmp_path / "out" / "comparison.tex").read_text())
    assert standings[-1][:2] == ["treelora", r"$\mathbf{54.0} \pm 10.8$"]
    assert "6 of 8 runs are compared" in shown
    assert "- Left out, because they have not finished: 1 run (dead (FAILED))." in shown
    assert "Compared are 6 on a, b. Left out: 1 run on a;" in shown


def test_keys_may_be_in_one_text_or_several(tmp_path, store):
    for by in (["method,lora.rank"], ["method", "lora.rank"]):
        _, shown = run(store, tmp_path, by=by, filters=["seed<2", "method!=ewc"], reference="treelora, lora.rank=8")
        assert "methods: differences from treelora, lora.rank=8" in shown
        assert "4 of 8 runs are compared" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"target": "nothing"},
            r"experiment 'nothing' does not exist in .*; there are: .*'methods', 'scoreless'",
        ),
        ({"target": "Default"}, "experiment 'Default' has no run in sqlite"),
        ({"target": "scoreless"}, r"no run is left to compare; .* they have no scores: 1 run \(one\)"),
        ({"by": ["lora.rnk"]}, "--by: no run has a field or tag 'lora.rnk'; did you mean 'lora.rank'"),
        ({"filters": ["rank"]}, "filter 'rank': write key=value"),
        ({"filters": ["lora.rank=3"]}, r"filter 'lora.rank=3': fits none of 8 runs; lora.rank there is 8, none"),
        ({"reference": "gem"}, "reference 'gem' is none of the groups; there are: sequential; treelora"),
        ({"other": "treelora-0", "by": ["method"]}, "--by is for the runs of an experiment"),
        ({"other": "nobody", "target": "treelora-0"}, "'nobody' is neither the folder nor the MLflow id nor the name"),
    ],
)
def test_bad_input_is_one_message(tmp_path, store, given, message):
    with pytest.raises(DataError, match=message):
        run(store, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_single_run_wants_a_second(tmp_path, store):
    one = finished_run(tmp_path / "one", ["alpha", "beta", "gamma"])
    with pytest.raises(DataError, match="one is one run: give a second one, or see `treelora report"):
        run(store, tmp_path / "out", str(one.path))


def test_an_unreachable_server_is_one_line(tmp_path):
    server = Server(tmp_path)  # nobody listens
    with pytest.raises(TrackingError, match=rf"^MLflow at {server.uri}: can't be reached: .*refused$"):
        run(server.uri, tmp_path / "out")


def test_a_run_of_mlflow_beside_one_in_a_folder(tmp_path, store):
    one = finished_run(tmp_path / "one", ["alpha", "beta", "gamma"], name="one")
    two = finished_run(tmp_path / "two", ["alpha", "beta", "gamma"], name="in MLflow", method="ewc")
    params = {"method": "ewc", "lora.rank": 8}
    run_id = add_run(store, "pairs", "in MLflow", params, run_tags("ewc", two.names), artifacts_folder=two.path)
    page, shown = run(store, tmp_path / "out", str(one.path), run_id, html=True)
    assert page == tmp_path / "out" / "report.html"
    assert "one (treelora) against in MLflow (ewc)" in page.read_text()
    assert f"- in MLflow: MLflow run {run_id}, FINISHED" in shown
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| method | treelora | ewc |" in text
    assert "| OP last (%) | 80.00 | 80.00 | +0.00 |" in text
    by_name, _ = run(store, tmp_path / "again", str(one.path), "in MLflow")
    assert by_name.read_text() == text
