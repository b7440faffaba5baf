"""The evaluator's three inference modes against scoring by hand, and its sharing over ranks."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.streams import TASKS, build_loop, outcome, same_adapter, tiny_config
from treelora.adapters import AdapterState, mean_adapter
from treelora.engine import OptimizerSpec, TorchEngine, read_adapter
from treelora.evaluation.evaluator import Evaluator
from treelora.evaluation.matrix import Score
from treelora.evaluation.reader import EvaluationOptions, TextReader
from treelora.loop import StreamLoop
from treelora.tree import SignatureTree
from treelora_platform.assemble import load_adapted_model

MODES = ("last", "merged", "routed")
SEEN = [0, 1, 2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_config(tmp_path_factory.mktemp("evaluator"))


@pytest.fixture(scope="module")
def loop(config: Any) -> StreamLoop:
    return build_loop(config)


@pytest.fixture(scope="module")
def bank(loop: StreamLoop) -> list[AdapterState]:
    """Three adapters that answer differently, for they are random; the engine is under the last."""
    states = []
    for seed in SEEN:
        g = torch.Generator().manual_seed(seed)
        states.append({k: torch.randn(v.shape, generator=g) for k, v in read_adapter(loop.engine).items()})
    return states


def evaluator(loop: StreamLoop, engine: Any, rows: int = 4) -> Evaluator:
    options = EvaluationOptions(MODES, batch_rows=rows, router_layer=1, router_rows=8)
    tests, tokenizer = loop.evaluator.tests, loop.evaluator.reader.tokenizer
    return Evaluator(engine, tests, options, TextReader(engine, tests, options, tokenizer))


def features_of(judge: Evaluator, task: int) -> torch.Tensor:
    return judge.reader.features(judge.tests[task], range(len(judge.tests[task])))


def judged(loop: StreamLoop, engine: Any, bank: list[AdapterState], rows: int = 4) -> tuple[Evaluator, list[Score]]:
    judge = evaluator(loop, engine, rows)
    for unit in loop.units:
        judge.learn_task(unit.name, unit.splits[0])
    engine.write_adapter(bank[-1])
    return judge, judge.score(SEEN, 2, TASKS[2], bank)


def naive_percent(loop: StreamLoop, adapters: list[AdapterState], task: int) -> float:
    """Percent of right answers, one row and one choice at a time; `adapters` has one for each row."""
    engine: Any = loop.engine
    engine.module.eval()
    test, right = loop.evaluator.tests[task], 0
    for row, (place, example) in enumerate(zip(test.chosen, test.examples, strict=True)):
        engine.write_adapter(adapters[row])
        prompt = test.rows.prompt_ids(int(place)).tolist()
        scores = []
        for ids in test.rows.choice_ids(int(place)):
            with torch.no_grad():
                logits = engine.module(input_ids=torch.tensor([prompt + ids.tolist()])).logits[0]
            logs = torch.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]
            scores.append(float(logs[torch.arange(len(ids)), torch.from_numpy(np.array(ids)).long()].mean()))
        right += example.choices[int(np.argmax(scores))] == example.answer
    return 100 * right / len(test)


def test_each_mode_against_scoring_by_hand(loop: StreamLoop, bank: list[AdapterState]) -> None:
    judge, scores = judged(loop, loop.engine, bank)
    found, merged = outcome(scores), mean_adapter(bank)
    assert [(s.task, s.metric, s.rows, s.after_task) for s in scores[:3]] == [
        (name, "accuracy", 6, TASKS[2]) for name in TASKS
    ]
    different = set()
    for task in SEEN:
        count = len(loop.evaluator.tests[task])
        chosen = judge.router.predict(features_of(judge, task))[0]
        assert found["last", task, 2] == pytest.approx(naive_percent(loop, [bank[2]] * count, task))
        assert found["merged", task, 2] == pytest.approx(naive_percent(loop, [merged] * count, task))
        assert found["routed", task, 2] == pytest.approx(naive_percent(loop, [bank[int(k)] for k in chosen], task))
        different |= {found[mode, task, 2] for mode in MODES}
    assert len(different) > 1


def test_the_router_is_judged_on_all_rows(loop: StreamLoop, bank: list[AdapterState]) -> None:
    judge, _ = judged(loop, loop.engine, bank)
    taken = [judge.router.predict(features_of(judge, t))[0] for t in SEEN]
    margins = [judge.router.predict(features_of(judge, t))[1] for t in SEEN]
    middle = float(torch.cat(margins).median())
    judge.options = replace(judge.options, router_margin=middle)
    report = judge.router_report(SEEN)
    assert report is not None
    hits = torch.cat([t == task for task, t in zip(SEEN, taken, strict=True)])
    assert report.accuracy == pytest.approx(100 * float(hits.float().mean()))
    assert report.fallback_share == pytest.approx(100 * float((torch.cat(margins) < middle).float().mean()))
    assert 0 < report.fallback_share < 100
    pairs = Counter((task, int(t)) for task, row in zip(SEEN, taken, strict=True) for t in row if t != task)
    assert {(task, other): count for task, other, count in report.mixed_up} == dict(pairs)
    assert evaluator(loop, loop.engine).router_report(SEEN) is None


@pytest.mark.parametrize("grouped", [False, True])
def test_unsure_prompts_are_answered_by_the_average(loop: StreamLoop, bank: list[AdapterState], grouped: bool) -> None:
    """Against scoring by hand with the mean adapter of the node around both tasks, or of the two."""
    shared = [bank[0], bank[0], bank[2]] if grouped else bank
    groups = ((2,), (0, 1)) if grouped else None
    tree = SignatureTree.build(np.eye(3, 4, dtype=np.float32)[:2, None]) if grouped else None
    judge, _ = judged(loop, loop.engine, bank)
    routes = {task: judge._routes(task) for task in SEEN}
    middle = float(np.median(np.concatenate([r.margin_n for r in routes.values()])))
    judge.options = replace(judge.options, router_margin=middle)
    judge._answers = {}
    scores = outcome(judge.score(SEEN, 2, TASKS[2], shared, tree=tree, groups=groups))
    used = set()
    for task in SEEN:
        adapters = []
        for best, second, margin in zip(*vars(routes[task]).values(), strict=True):
            pair = {int(best), int(second)}
            if margin >= middle or (grouped and pair == {0, 1}):
                adapters.append(shared[int(best)])
            elif grouped:
                adapters.append(mean_adapter([bank[0], bank[2]], [2, 1]))
            else:
                adapters.append(mean_adapter([bank[k] for k in sorted(pair)]))
            used.add(margin >= middle)
        assert scores["routed", task, 2] == pytest.approx(naive_percent(loop, adapters, task))
    assert used == {False, True}


def test_averages_that_are_no_longer_asked_for_are_forgotten(loop: StreamLoop, bank: list[AdapterState]) -> None:
    judge, _ = judged(loop, loop.engine, bank)
    judge.options = replace(judge.options, router_margin=1e9)
    signatures = np.array([[[0, 0, 1.0]], [[0, 0.1, 1]], [[9, 9, 0]]], dtype=np.float32)
    tree = SignatureTree.build(signatures)
    judge.score(SEEN, 2, TASKS[2], bank, tree=tree)
    first = {key for key, _ in judge._answers}
    again = outcome(judge.score(SEEN, 2, TASKS[2], bank, tree=tree))
    assert first == {key for key, _ in judge._answers}
    assert {key for key in first if key.startswith("node ")} <= {"node 0|1", "node 0|1|2"}
    other = SignatureTree.build(signatures[[2, 0, 1]])  # now tasks 1 and 2 are the pair
    judge.score(SEEN, 2, TASKS[2], bank, tree=other)
    assert {key for key, _ in judge._answers if key.startswith("node ")} <= {"node 1|2", "node 0|1|2"}
    fresh, _ = judged(loop, loop.engine, bank)
    fresh.options = judge.options
    assert outcome(fresh.score(SEEN, 2, TASKS[2], bank, tree=tree)) == again


def test_the_adapter_under_training_is_left_as_it_was(loop: StreamLoop, bank: list[AdapterState]) -> None:
    loop.engine.module.train()
    judged(loop, loop.engine, bank)
    assert same_adapter(read_adapter(loop.engine), bank[-1])
    assert loop.engine.module.training


def test_kept_answers_change_no_score(loop: StreamLoop, bank: list[AdapterState]) -> None:
    """A judge that has gone through the whole stream says the same as one that begins at its end."""
    old = evaluator(loop, loop.engine)
    for after in SEEN:
        old.learn_task(TASKS[after], loop.units[after].splits[0])
        loop.engine.write_adapter(bank[after])
        scores = old.score(SEEN[: after + 1], after, TASKS[after], bank[: after + 1])
    _, fresh = judged(loop, loop.engine, bank)
    assert outcome(scores) == outcome(fresh)


def test_state_round_trip(loop: StreamLoop, bank: list[AdapterState]) -> None:
    judge, scores = judged(loop, loop.engine, bank)
    again = evaluator(loop, loop.engine)
    again.load_state_dict(judge.state_dict())
    assert again._answers == judge._answers
    assert {key for key, _ in judge._answers} == {"task 0", "task 1", "task 2"}  # the mean's are not kept
    assert again.router.names == judge.router.names == list(TASKS)
    assert outcome(again.score(SEEN, 2, TASKS[2], bank)) == outcome(scores)
    empty = evaluator(loop, loop.engine)
    empty.load_state_dict(evaluator(loop, loop.engine).state_dict())
    assert (empty._answers, empty.router.names) == ({}, [])


class Rank(TorchEngine):
    """One of several engines in threads that exchange values for real."""

    def __init__(self, module: Any, rank: int, shared: list[Any], barrier: threading.Barrier):
        super().__init__(module, OptimizerSpec())
        self.rank, self.world_size, self.shared, self.barrier = rank, len(shared), shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait(60)
        values = list(self.shared)
        self.barrier.wait(60)
        return values


@pytest.mark.parametrize("world", [2, 4])
def test_sharing_over_ranks_equals_one_rank(
    config: Any, loop: StreamLoop, bank: list[AdapterState], world: int, tmp_path: Path
) -> None:
    judge, expected = judged(loop, loop.engine, bank, rows=1)  # a row a batch: no padding, so the same bits
    barrier, shared, results = threading.Barrier(world), [None] * world, [None] * world
    engines = [Rank(load_adapted_model(config, 3), rank, shared, barrier) for rank in range(world)]

    def work(rank: int) -> None:
        results[rank] = judged(loop, engines[rank], bank, rows=1)  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other, scores in results:  # type: ignore[misc]
        assert outcome(scores) == outcome(expected)
        assert other._answers == judge._answers
        assert torch.equal(other.router.state_dict()["means"], judge.router.state_dict()["means"])


def test_without_adapters_only_last_is_scored(loop: StreamLoop) -> None:
    scores = evaluator(loop, loop.engine).score(SEEN, 2, "all", [])
    assert [(score.mode, score.task_index) for score in scores] == [("last", 0), ("last", 1), ("last", 2)]
