import json

import numpy as np
import pytest

from tests.unit.test_memory import LAYERS, SEARCHES, SIZE, digest, filled, make, play
from tests.unit.test_tree import random_signatures
from treelora.errors import CheckpointError
from treelora.memory import ProtocolError, StepCall, TaskMemory
from treelora.tree import SignatureTree


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("stop", [0, 1, 23])
def test_restored_in_mid_task_it_goes_on_bit_for_bit(search, stop):
    memory = filled(7, search=search, seed=11)
    memory.begin_task("new", 60)
    if stop:
        play(memory, "new", 1, stop)
    state = memory.state_dict()
    frozen = digest(state)
    restored = TaskMemory.from_state_dict(state)
    assert digest(restored.state_dict()) == frozen
    rest = play(memory, "new", stop + 1, 60)
    assert digest(state) == frozen  # the state is a copy, not a view
    assert np.array_equal(play(restored, "new", stop + 1, 60), rest)
    for each in (memory, restored):
        each.end_task("new", random_signatures(8, LAYERS, SIZE)[7])
        each.begin_task("next", 5)
    assert digest(memory.state_dict()) == digest(restored.state_dict())


def test_restored_before_anything_and_between_tasks():
    for memory in (make(), filled(1), filled(5)):
        restored = TaskMemory.from_state_dict(memory.state_dict())
        assert digest(restored.state_dict()) == digest(memory.state_dict())
        assert restored.tasks == memory.tasks
    memory = make()
    memory.begin_task("first", 5)
    memory.step(StepCall("r", "first", 1))
    restored = TaskMemory.from_state_dict(memory.state_dict())
    assert restored.step(StepCall("r", "first", 2)).arms.tolist() == [-1] * LAYERS


def test_state_survives_a_file_without_pickle(tmp_path):
    memory = filled(3)
    memory.begin_task("new", 9)
    play(memory, "new", 1, 4)
    np.savez(tmp_path / "memory.npz", **memory.state_dict())
    with np.load(tmp_path / "memory.npz", allow_pickle=False) as stored:
        restored = TaskMemory.from_state_dict({key: stored[key] for key in stored.files})
    assert np.array_equal(play(restored, "new", 5, 9), play(memory, "new", 5, 9))


def test_another_run_takes_over_on_request_only():
    memory = filled(2)
    memory.begin_task("new", 9)
    memory.step(StepCall("old run", "new", 1))
    state = memory.state_dict()
    with pytest.raises(ProtocolError, match="belongs to run 'old run'"):
        TaskMemory.from_state_dict(state).step(StepCall("new run", "new", 2))
    assert TaskMemory.from_state_dict(state, run="new run").step(StepCall("new run", "new", 2)).step == 2


def change_record(state, **changes):
    return {**state, "memory": json.dumps({**json.loads(state["memory"]), **changes})}


def test_damaged_states_are_refused():
    memory = filled(3)
    memory.begin_task("new", 9)
    play(memory, "new", 1, 4)
    state = memory.state_dict()
    other_tree = SignatureTree.build(random_signatures(2, LAYERS, SIZE)).to_json()
    config = json.loads(state["memory"])["config"]
    damaged = [
        {key: value for key, value in state.items() if key != missing}
        for missing in ("memory", "sketches", "arms", "lcb", "bandit.counts", "bandit.sums")
    ]
    damaged += [
        {**state, "memory": state["memory"][:-5]},
        {**state, "sketches": state["sketches"][:2]},
        {**state, "sketches": state["sketches"] * np.nan},
        {**state, "arms": np.full(LAYERS, 3)},
        {**state, "arms": np.full(LAYERS, -1)},
        {**state, "bandit.counts": state["bandit.counts"][:, :-1]},
        change_record(state, format=0),
        change_record(state, tree=other_tree),
        change_record(state, tree=None),
        change_record(state, tasks=["a", "a", "b"]),
        change_record(state, tasks=["a", 2, "b"]),
        change_record(state, config={**config, "search": "guess"}),
        change_record(state, config={**config, "unknown": 1}),
        change_record(state, horizon=0),
    ]
    for bad in damaged:
        with pytest.raises(CheckpointError):
            TaskMemory.from_state_dict(bad)
    assert TaskMemory.from_state_dict(state).tasks == memory.tasks


def test_state_does_not_grow_with_steps():
    memory = filled(4)
    memory.begin_task("new", 500)
    play(memory, "new", 1, 2)
    before = sum(np.asarray(value).nbytes for key, value in memory.state_dict().items() if key != "memory")
    play(memory, "new", 3, 300)
    after = sum(np.asarray(value).nbytes for key, value in memory.state_dict().items() if key != "memory")
    assert before == after
