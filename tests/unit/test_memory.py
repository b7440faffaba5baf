import hashlib
import json

import numpy as np
import pytest

from tests.unit.test_tree import branches, family_signatures, random_signatures
from treelora.bandit import TreeBandit
from treelora.errors import ConfigError, DataError
from treelora.memory import MemoryConfig, ProtocolError, StepCall, TaskMemory
from treelora.tree import SignatureTree

LAYERS, SIZE = 3, 6
SEARCHES = ("tree_lcb", "flat_lcb", "full", "random", "newest")


def make(**settings):
    return TaskMemory(MemoryConfig(layers=LAYERS, sketch_size=SIZE, **settings))


def filled(tasks, **settings):
    memory = make(**settings)
    for index, sketch in enumerate(random_signatures(tasks, LAYERS, SIZE)):
        memory.begin_task(f"task {index}", 10)
        memory.end_task(f"task {index}", sketch)
    return memory


def play(memory, task, first, last, run="r"):
    """Steps first..last with losses that depend on (step, layer, arm) only; [steps, L] arms."""
    arms = []
    for step in range(first, last + 1):
        observation = None
        if step > 1 and memory.tasks:
            every = np.random.default_rng(step - 1).random((len(memory.tasks), LAYERS))
            last_arms = memory.describe()["arms"]
            full = memory.config.search == "full"
            observation = every if full else every[last_arms, np.arange(LAYERS)]
        arms.append(memory.step(StepCall(run, task, step, observation)).arms)
    return np.stack(arms)


def digest(state):
    total = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        total.update(key.encode())
        total.update(value.encode() if isinstance(value, str) else np.ascontiguousarray(value).tobytes())
    return total.hexdigest()


def test_no_past_task():
    memory = make()
    assert memory.begin_task("first", 5).sketches.shape == (0, LAYERS, SIZE)
    for step in (1, 2):
        selection = memory.step(StepCall("r", "first", step))
        assert selection.arms.tolist() == [-1, -1, -1]
        assert selection.arms.dtype == np.int64
        assert selection.lcb.dtype == np.float32
        assert (selection.task, selection.step) == ("first", step)
    with pytest.raises(ProtocolError, match="there is no past task"):
        memory.step(StepCall("r", "first", 3, np.zeros(LAYERS)))


def test_a_stream_by_hand():
    signatures = random_signatures(3, LAYERS, SIZE)
    memory = make()
    memory.begin_task("a", 5)
    memory.end_task("a", signatures[0])
    assert np.array_equal(memory.begin_task("b", 5).sketches, signatures[:1])
    assert memory.step(StepCall("r", "b", 1)).arms.tolist() == [0, 0, 0]
    memory.end_task("b", signatures[1])
    assert memory.tasks == ["a", "b"]
    assert np.array_equal(memory.begin_task("c", 8).sketches, signatures[:2])
    assert memory.tree.to_json() == SignatureTree.build(signatures[:2]).to_json()
    assert memory.bandit.horizon == 8
    first = memory.step(StepCall("r", "c", 1))
    assert first.arms.tolist() == [0, 0, 0]
    assert (first.lcb == -np.inf).all()
    memory.step(StepCall("r", "c", 2, np.array([0.1, 0.2, 0.3])))
    described = memory.describe()
    assert described["pulls"] == [[1, 1, 1], [0, 0, 0]]
    assert described["lcb"][1] == [None, None, None]
    assert described["arms"] == [1, 1, 1]
    assert json.loads(json.dumps(described, allow_nan=True)).keys() == described.keys()


def test_arms_are_those_of_the_bandit():
    memory = filled(9)
    memory.begin_task("new", 100)
    bandit = TreeBandit(memory.tree, LAYERS, memory.config.exploration, 100)
    arms = play(memory, "new", 1, 60)
    for step in range(1, 60):
        assert np.array_equal(bandit.select(), arms[step - 1])
        losses = np.random.default_rng(step).random((9, LAYERS))
        bandit.observe(arms[step - 1], losses[arms[step - 1], np.arange(LAYERS)])


def test_newest_is_the_arm_of_the_last_task_also_when_arms_were_merged():
    memory, places = make(search="newest", max_arms=2), set()
    for index, sketch in enumerate(random_signatures(8, LAYERS, SIZE)):
        memory.begin_task(f"task {index}", 10)
        if index:
            (arm,) = set(memory.step(StepCall("r", f"task {index}", 1)).arms.tolist())
            assert index - 1 in memory.arms.groups[arm]
            places.add(arm)
        memory.end_task(f"task {index}", sketch)
    assert places == {0, 1}


@pytest.mark.parametrize("search", SEARCHES)
def test_repeated_calls_change_nothing(search):
    once, twice = filled(5, search=search), filled(5, search=search)
    rng = np.random.default_rng(0)
    shape = (5, LAYERS) if search == "full" else LAYERS
    for memory in (once, twice):
        memory.begin_task("new", 30)
    assert np.array_equal(twice.begin_task("new", 30).sketches, once.begin_task("new", 30).sketches)
    for step in range(1, 31):
        call = StepCall("r", "new", step, rng.random(shape) if step > 1 else None)
        answer = once.step(call)
        for repeated in (twice.step(call), twice.step(call), twice.step(StepCall("r", "new", step))):
            assert np.array_equal(repeated.arms, answer.arms)
            assert np.array_equal(repeated.lcb, answer.lcb)
    sketch = random_signatures(6, LAYERS, SIZE)[5]
    once.end_task("new", sketch)
    twice.end_task("new", sketch)
    twice.end_task("new", sketch)
    assert digest(once.state_dict()) == digest(twice.state_dict())


def test_calls_out_of_order_name_what_was_expected():
    memory = make()
    sketch = random_signatures(1, LAYERS, SIZE)[0]
    with pytest.raises(ProtocolError, match=r"step 1 of 'a': expected begin_task\('a'\)"):
        memory.step(StepCall("r", "a", 1))
    with pytest.raises(ProtocolError, match=r"end_task\('a'\): expected begin_task\('a'\)"):
        memory.end_task("a", sketch)
    memory.begin_task("a", 5)
    with pytest.raises(ProtocolError, match=r"begin_task\('b', 5\): expected end_task\('a'\)"):
        memory.begin_task("b", 5)
    with pytest.raises(ProtocolError, match="open with horizon 5"):
        memory.begin_task("a", 6)
    with pytest.raises(ProtocolError, match="step 2 of 'a': expected step 1"):
        memory.step(StepCall("r", "a", 2))
    with pytest.raises(ProtocolError, match="expected step 1"):
        memory.step(StepCall("r", "a", 0))
    with pytest.raises(ProtocolError, match="step 1 of 'b': expected a step of 'a'"):
        memory.step(StepCall("r", "b", 1))
    memory.step(StepCall("r", "a", 1))
    with pytest.raises(ProtocolError, match=r"step 3 of 'a': expected step 2 \(or 1 again\)"):
        memory.step(StepCall("r", "a", 3))
    with pytest.raises(ProtocolError, match="run 's': this memory belongs to run 'r'"):
        memory.step(StepCall("s", "a", 2))
    with pytest.raises(ProtocolError, match=r"end_task\('b'\): expected end_task\('a'\)"):
        memory.end_task("b", sketch)
    memory.end_task("a", sketch)
    with pytest.raises(ProtocolError, match="already recorded, with another sketch"):
        memory.end_task("a", -sketch)
    with pytest.raises(ProtocolError, match="already learnt, as task 0"):
        memory.begin_task("a", 5)
    with pytest.raises(ProtocolError, match="expected begin_task"):
        memory.step(StepCall("r", "a", 2))
    with pytest.raises(ConfigError, match="horizon = 0"):
        memory.begin_task("b", 0)


def test_an_observation_before_any_arm_is_refused():
    memory = filled(2)
    memory.begin_task("new", 5)
    with pytest.raises(ProtocolError, match="no arm was chosen before it"):
        memory.step(StepCall("r", "new", 1, np.zeros(LAYERS)))


def test_a_skipped_step_observes_nothing():
    memory = filled(4)
    memory.begin_task("new", 20)
    first = memory.step(StepCall("r", "new", 1)).arms
    again = memory.step(StepCall("r", "new", 2)).arms
    assert np.array_equal(first, again)
    assert not memory.bandit.counts.any()


def test_bad_observations_name_task_step_and_layer_and_change_nothing():
    memory = filled(4)
    memory.begin_task("new", 20)
    memory.step(StepCall("r", "new", 1))
    before = digest(memory.state_dict())
    with pytest.raises(DataError, match="task 'new', observation of step 1: layer 2: loss nan"):
        memory.step(StepCall("r", "new", 2, np.array([0.1, 0.2, np.nan])))
    with pytest.raises(DataError, match="task 'new', observation of step 1"):
        memory.step(StepCall("r", "new", 2, np.array([0.1, 0.2])))
    assert digest(memory.state_dict()) == before
    assert memory.step(StepCall("r", "new", 2, np.array([0.1, 0.2, 0.3]))).step == 2


def test_bad_sketches_name_task_and_layer_and_change_nothing():
    memory = filled(1)
    memory.begin_task("new", 5)
    before = digest(memory.state_dict())
    sketch = random_signatures(2, LAYERS, SIZE)[1]
    bad = sketch.copy()
    bad[1, 2] = np.nan
    with pytest.raises(DataError, match="task 'new', layer 1: the sketch holds NaN"):
        memory.end_task("new", bad)
    with pytest.raises(DataError, match=r"task 'new', layer 0: the sketch has norm 2, .*normalise"):
        memory.end_task("new", 2 * sketch)
    with pytest.raises(DataError, match=r"shape \(2, 6\), need \(3, 6\)"):
        memory.end_task("new", sketch[:2])
    assert digest(memory.state_dict()) == before
    sketch[0] = 0  # a layer without any gradient
    memory.end_task("new", sketch)
    assert memory.tasks == ["task 0", "new"]


@pytest.mark.parametrize("tree", ["medoid", "agglomerative", "paper"])
def test_rebuilds_while_small_and_inserts_beyond(tree):
    signatures = random_signatures(9, LAYERS, SIZE)
    memory = make(tree=tree, rebuild_limit=6)
    expected = None
    for index, sketch in enumerate(signatures):
        if index == 4:
            memory = TaskMemory.from_state_dict(memory.state_dict())  # loses the kept distances
        memory.begin_task(str(index), 5)
        memory.end_task(str(index), sketch)
        if index < 6:
            expected = SignatureTree.build(signatures[: index + 1], tree)
        else:
            expected = expected.insert(signatures[: index + 1])
        assert memory.tree.to_json() == expected.to_json()


def test_the_tree_finds_the_families():
    signatures, labels = family_signatures([3, 3, 2], layers=LAYERS, size=SIZE)
    memory = make()
    for index, sketch in enumerate(signatures):
        memory.begin_task(str(index), 5)
        memory.end_task(str(index), sketch)
    families = {frozenset(np.flatnonzero(labels == family).tolist()) for family in range(3)}
    assert families <= branches(memory.tree)


def test_answers_and_sketches_cannot_be_changed_from_outside():
    memory = filled(3)
    sketches = memory.begin_task("new", 5).sketches
    with pytest.raises(ValueError, match="read-only"):
        sketches[:] = 0
    state = memory.state_dict()
    again = TaskMemory.from_state_dict(state | {"sketches": (own := state["sketches"].copy())})
    own[:] = 0
    assert np.array_equal(again.past().sketches, sketches)
    with pytest.raises(ValueError, match="read-only"):
        memory.step(StepCall("r", "new", 1)).arms[0] = 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tree": "oak"}, "tree = 'oak'"),
        ({"search": "best"}, "search = 'best'"),
        ({"bound": "none"}, "bound = 'none'"),
        ({"blocks": 4}, "blocks = 4"),
        ({"blocks": 2, "tree": "paper"}, "blocks = 2"),
        ({"exploration": -0.1}, "exploration = -0.1"),
        ({"seed": -1}, "seed = -1"),
        ({"rebuild_limit": 0}, "rebuild_limit = 0"),
    ],
)
def test_settings_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
