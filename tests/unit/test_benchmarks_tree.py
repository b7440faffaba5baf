"""The benchmarks of tree and tracking at tiny sizes: they run, and what they count is right. No times."""

import numpy as np
import pytest

from benchmarks import measure, tracking_rate, tree_actor, tree_update
from benchmarks.filled_memory import filled
from treelora import tree_check
from treelora.memory import MemoryConfig, TaskMemory
from treelora.sketch_numpy import layer_distances
from treelora.tree import SignatureTree
from treelora_platform.tree_keeper import TreeKeeper


def test_spread_and_tail_by_hand():
    assert measure.spread([4, 1, 3, 2, 5]) == "3.00 (2.00 to 4.00)"
    assert measure.spread([0.001, 0.002], 1, 1e6) == "1,500.0 (1,250.0 to 1,750.0)"
    assert measure.tail(list(range(101)), 0) == "50 / 99"


def test_the_footer_names_machine_and_versions():
    text = measure.footer()
    assert f"numpy {np.__version__}" in text
    assert " x " in text.splitlines()[0]
    assert "commit " in text


@pytest.mark.parametrize("tasks", [1, 2, 8, 61])
def test_a_filled_state_is_a_whole_memory_with_true_bounds(tasks):
    config = MemoryConfig(layers=3, sketch_size=5)
    state, depth = filled(config, tasks)
    memory = TaskMemory.from_state_dict(state)
    tree = memory.tree
    assert (tree.tasks, int(tree.level.max())) == (tasks, depth)
    assert tree_check.problem(tree.left, tree.right, tree.task, tree.delta) is None
    sketches = memory.past().sketches
    for node in range(tree.nodes):
        below = sketches[tree.tasks_below(node)]
        widest = np.max([layer_distances(sketch, below).max(axis=0) for sketch in below], axis=0)
        assert (tree.delta[node] >= widest - 1e-6).all()


def test_timed_calls_are_all_made_and_equal_on_both_sides(tmp_path):
    config = MemoryConfig(layers=3, sketch_size=5)
    state, _ = filled(config, 8)
    keeper, memory = TreeKeeper(str(tmp_path)), TaskMemory.from_state_dict(state, run="run")
    keeper.open(config, state, "run")
    seconds, answers = ([], []), []
    for side, own in zip((keeper, memory), seconds, strict=True):
        side.begin_task("new", 20)
        answers.append([tree_actor.timed(side.step, first, 10, config, own) for first in (1, 11)])
    assert answers[0] == answers[1]
    assert len(seconds[0]) == len(seconds[1]) == memory.describe()["step"] == 20
    assert memory.bandit.counts[:, 0].tolist() == [19] * 3


def test_the_update_benchmark_compares_whole_trees(capsys):
    sizes = ["--tasks", "9", "300", "--layers", "3", "--sketch", "4", "--values", "16", "--rounds", "2"]
    small, large = tree_update.main([*sizes, "--threads", "1"])
    assert [small.tasks, large.tasks] == [9, 300]
    for one in (small, large):
        assert {name: len(taken) for name, taken in one.seconds.items()} == {
            **{"update": 2, "sketch": 2, "official": 2, "check": 2},
            "rebuild": 1,
        }
        assert one.nodes["update"] == one.nodes["rebuild"] == 2 * one.tasks - 1
        assert one.nodes["official"] > 1
    one.seconds = {"update": [2.0], "sketch": [1.0], "rebuild": [], "official": [60.0], "check": [10.0]}
    assert (one.ratio("update"), one.ratio("update", "sketch")) == (30.0, 20.0)
    assert "300" in capsys.readouterr().out


def test_beyond_the_limit_the_update_is_an_insertion():
    config = MemoryConfig(layers=2, sketch_size=4, rebuild_limit=8)
    before, _ = filled(config, 9)
    after, _ = filled(config, 10)
    memory = TaskMemory.from_state_dict(before)
    old = memory.tree
    memory.begin_task("new", 5)
    memory.end_task("new", after["sketches"][-1])
    grown = old.insert(memory.past().sketches)
    assert memory.tree.to_json() == grown.to_json()
    assert grown.to_json() != SignatureTree.build(memory.past().sketches).to_json()


def test_the_tracking_benchmark_counts_every_point(capsys):
    (found,) = tracking_rate.main(["--runs", "1", "--steps", "7", "--arms", "3", "--rounds", "1", "--where", "sqlite"])
    assert (found.points, found.kept) == (7 * (11 + 3), 7 * (11 + 3))
    assert "+0" in capsys.readouterr().out
