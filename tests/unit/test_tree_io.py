import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from tests.unit.test_tree import KINDS, random_signatures
from treelora.errors import CheckpointError, DataError
from treelora.tree import SignatureTree


@given(tasks=st.integers(1, 9), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
@settings(max_examples=30, deadline=None)
def test_json_round_trip_is_exact(tasks, seed, kind):
    tree = SignatureTree.build(random_signatures(tasks, seed=seed), kind)
    again = SignatureTree.from_json(tree.to_json())
    assert again.to_json() == tree.to_json()
    assert np.array_equal(again.delta, tree.delta)
    assert np.array_equal(again.parent, tree.parent)
    assert again.kind == kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": [1, -1, 0, -1, -1], "delta": [[1.0]] * 5}, "stands where preorder"),
        ({"left": [2, -1, 3, -1, -1]}, "stands where preorder"),
        ({"left": [1, -1, 2, -1, -1]}, "stands where preorder"),
        ({"right": [2, -1, 9, -1, -1]}, "beyond the last node"),
        ({"task": [-1, 0, -1, 1, 1]}, "once each"),
        ({"task": [-1, 0, -1, 1, 5]}, "once each"),
        ({"right": [2, -1, -1, -1, -1]}, "neither a leaf"),
        ({"task": [-1, 0, -1, 1]}, "aren't those of 2N - 1 nodes"),
        ({"delta": [[0.0]] * 4}, "delta has shape"),
        ({"delta": [[1.0], [0.0], [2.0], [0.0], [0.0]]}, "larger delta"),
        ({"delta": [[-1.0], [0.0], [0.0], [0.0], [0.0]]}, "negative"),
        ({"delta": [["x"], [0.0], [0.0], [0.0], [0.0]]}, "can't be read"),
        ({"kind": "best"}, "choose one of medoid"),
        ({"blocks": 2}, r"blocks = 2: must lie in 1\.\.1"),
        ({"format": 2}, "format 2, not 1"),
        ({"left": None}, "can't be read"),
    ],
)
def test_malformed_json_is_refused(change, message):
    good = {
        "format": 1,
        "kind": "medoid",
        "blocks": 1,
        "left": [1, -1, 3, -1, -1],
        "right": [2, -1, 4, -1, -1],
        "task": [-1, 0, -1, 1, 2],
        "delta": [[1.0], [0.0], [0.5], [0.0], [0.0]],
    }
    assert SignatureTree.from_json(json.dumps(good)).tasks == 3
    with pytest.raises(CheckpointError, match=message):
        SignatureTree.from_json(json.dumps({**good, **change}))
    missing = {key: value for key, value in good.items() if key not in change}
    with pytest.raises(CheckpointError, match="can't be read"):
        SignatureTree.from_json(json.dumps(missing))


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"left": []}', "{"])
def test_other_json_is_refused(text):
    with pytest.raises(CheckpointError, match="can't be read"):
        SignatureTree.from_json(text)


def test_linkage_is_scipys():
    signatures = random_signatures(11)
    tree = SignatureTree.build(signatures)
    rows = tree.linkage()
    assert hierarchy.is_valid_linkage(rows)
    assert hierarchy.is_monotonic(rows)
    # The cophenetic distance of two tasks is the height of their lowest common branch.
    cophenetic = squareform(hierarchy.cophenet(rows))
    for i, j in combinations(range(11), 2):
        common = max(node for node in range(tree.nodes) if {i, j} <= set(tree.tasks_below(node).tolist()))
        assert cophenetic[i, j] == tree.delta[common].mean()


def test_table():
    tree = SignatureTree.build(np.array([10.0, 0.0, 12.0])[:, None, None])
    assert tree.to_table().to_pydict() == {
        "node": [0, 1, 2, 3, 4],
        "parent": [-1, 0, 1, 1, 0],
        "left": [1, 2, -1, -1, -1],
        "right": [4, 3, -1, -1, -1],
        "task": [-1, -1, 0, 2, 1],
        "level": [0, 1, 2, 2, 1],
        "tasks": [3, 2, 1, 1, 1],
        "delta": [[12.0], [2.0], [0.0], [0.0], [0.0]],
    }


def test_render():
    tree = SignatureTree.build(np.array([10.0, 0.0, 12.0])[:, None, None])
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(tree.render(["mnli", "[red]sst-2", "cb"], annotations={"cb": "7 pulls"}))
    assert capture.get().splitlines() == [
        "3 tasks  diameter 12.000".ljust(80)[: len(capture.get().splitlines()[0])],
        "├── 2 tasks  diameter 2.000",
        "│   ├── mnli",
        "│   └── cb  7 pulls",
        "└── [red]sst-2",
    ]
    with pytest.raises(DataError, match="2 names for 3 tasks"):
        tree.render(["a", "b"])


@pytest.mark.parametrize("tasks", [1, 6])
def test_draw_writes_a_png(tmp_path, tasks):
    import matplotlib.image

    tree = SignatureTree.build(random_signatures(tasks))
    names = ["$x", "ünïcode", "b", "c", "d", "e"][:tasks]
    plain, coloured = tmp_path / "plain.png", tmp_path / "coloured.png"
    tree.draw(plain, names)
    tree.draw(coloured, names, families=["nli", "qa", "nli", "qa", "nli", "qa"][:tasks])
    assert plain.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    def has_colour(path):
        image = matplotlib.image.imread(path)[..., :3]
        return bool((np.ptp(image, axis=2) > 0.2).any())

    assert not has_colour(plain)
    assert has_colour(coloured)
    with pytest.raises(DataError, match="7 names"):
        tree.draw(plain, ["x"] * 7)
