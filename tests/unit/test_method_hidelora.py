"""HiDe-LoRA and HiDe-Prompt: starts, the ensemble by hand, an adapter a task, routing, alignment, resumption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.support.prompted_streams import assert_resumes, begun, frozen_weights, prompted_config
from tests.support.streams import TASKS, build_loop, outcome, recorded, same_adapter, tiny_config
from treelora.adapters import AdapterState, fresh_tensor
from treelora.engine import read_adapter, read_head
from treelora.evaluation.batching import evaluating
from treelora.loop import StreamLoop
from treelora.methods.hidelora import HiDeLoRAOptions, drawn
from treelora.methods.hideprompt import HiDePromptOptions
from treelora.methods.spreading import spread_loss
from treelora.models.vision import pooled_features
from treelora.objective import answer_loss

N = 3
ALIGN = {"align": True}


def ends(loop: StreamLoop) -> list[AdapterState]:
    """Runs the stream; each task's adapter as training left it."""
    method: Any = loop.method
    end_task, found = method.end_task, []

    def spy(engine: Any) -> None:
        found.append(read_adapter(engine))
        end_task(engine)

    method.end_task = spy
    loop.run()
    return found


def test_the_ensemble_by_hand() -> None:
    past = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, -2.0])}]
    assert drawn({"a": torch.tensor([10.0, 0.0])}, past, 0.25)["a"].tolist() == [8.0, 0.0]
    assert drawn({"a": torch.tensor([10.0, 1.0])}, past[:1], 0.1)["a"].tolist() == pytest.approx([9.1, 1.1])


def test_the_spreading_term_by_hand() -> None:
    mean, one, other = [1.0, 0.0], [0.5, 0.5], [0.0, 2.0]
    points, total = [mean, one, other], 0.0
    for v in points:
        likeness = [math.exp(sum(a * b for a, b in zip(v, w, strict=True)) / 0.8) for w in points]
        total -= math.log(likeness[points.index(v)] / sum(likeness))
    found = spread_loss(torch.tensor([one, other]), torch.tensor([mean]))
    assert found.item() == pytest.approx(total / 3, rel=1e-6)
    alone = spread_loss(torch.tensor([one, other]), None)  # of the first task
    assert alone.item() == pytest.approx((math.log(1 + math.exp(0.5 / 0.8)) + math.log(1 + math.exp(-3 / 0.8))) / 2)


@pytest.mark.parametrize("method", ["hidelora", "hideprompt"])
def test_the_loss_has_the_spreading_term(method: str, tmp_path: Path) -> None:
    """Of what the head reads, and of the means that the alignment keeps of the first task's classes."""
    config = prompted_config(tmp_path, method=method, vision=ALIGN, lora={"dropout": 0.0}, **{method: {"spread": 0.5}})
    loop, found = build_loop(config), []
    method_loss: Any = loop.method.loss

    def spy(engine: Any, batch: Any, normaliser: float) -> Tensor:
        loss: Tensor = method_loss(engine, batch, normaliser)
        features = next(pooled_features(engine.module, [batch["pixel_values"]]))
        plain = answer_loss(engine.module, batch, normaliser)
        means = loop.alignment.means() if loop.alignment and loop.position.unit else None
        expected = 0.5 * spread_loss(features, means) * len(features) / normaliser
        found.append(((loss - plain).item(), expected.item()))
        return loss

    loop.method.loss = spy  # type: ignore[method-assign]
    loop.run()
    assert len(found) == len(recorded(loop).steps)
    for (term, expected), step in zip(found, recorded(loop).steps, strict=True):
        assert term == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert step.penalty_loss == pytest.approx(expected, rel=1e-3)
        assert expected > 0
    assert loop.alignment
    means = loop.alignment.means()
    assert means is not None
    assert len(means) == len(loop.units) * 2  # classes


def test_text_has_no_features_to_spread(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, method="hidelora", hidelora={"spread": 100.0}, evaluation={"modes": ["routed"]})
    loop = build_loop(config)
    loop.run()
    assert all(step.penalty_loss is None and step.loss < 20 for step in recorded(loop).steps)


@pytest.mark.parametrize("start", ["previous", "fresh"])
def test_starts(start: str, tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method="hidelora", vision=ALIGN, hidelora={"start": start}))
    starts = begun(loop, read_adapter)
    fresh = {name: fresh_tensor(name, tensor.shape, 0) for name, tensor in loop.bank[0].items()}
    assert same_adapter(starts[0], fresh)
    for task in range(1, N):
        assert same_adapter(starts[task], fresh if start == "fresh" else loop.bank[task - 1])


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_an_adapter_a_task_is_drawn_to_the_mean_of_the_past(share: float, tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method="hidelora", vision=ALIGN, hidelora={"ensemble": share}))
    frozen = frozen_weights(loop)
    raw = ends(loop)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_weights(loop).items())
    assert same_adapter(loop.bank[0], raw[0])
    for task in range(1, N):
        for name, tensor in loop.bank[task].items():
            mean = sum(other[name] for other in loop.bank[:task]) / task
            torch.testing.assert_close(tensor, (1 - share) * raw[task][name] + share * mean)
    assert not any(same_adapter(one, other) for one, other in zip(loop.bank, loop.bank[1:], strict=False))


def test_a_task_s_adapter_does_not_know_what_came_before_a_fresh_start(tmp_path: Path) -> None:
    """Without classes before it, but the same rows in the same places: the second task's adapter is the same."""
    options = {"start": "fresh", "ensemble": 0.0}
    banks = []
    for spoilt in (False, True):
        loop = build_loop(tiny_config(tmp_path, method="hidelora", hidelora=options))
        if spoilt:  # another first task
            loop.method.begin_task = _spoilt(loop)  # type: ignore[method-assign]
        loop.run()
        banks.append(loop.bank)
    assert not same_adapter(banks[0][0], banks[1][0])
    assert same_adapter(banks[0][1], banks[1][1])


def _spoilt(loop: StreamLoop) -> Any:
    begin_task = loop.method.begin_task

    def begin(task: Any, engine: Any, bank: Any) -> None:
        begin_task(task, engine, bank)
        if task.index == 0:
            engine.write_adapter({name: t + 0.1 for name, t in read_adapter(engine).items()})

    return begin


@pytest.mark.parametrize("method", ["hidelora", "hideprompt"])
def test_a_test_row_gets_the_adapter_of_the_task_that_it_is_taken_for(method: str, tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method=method, vision=ALIGN))
    loop.run()
    model: Any = loop.engine.module
    scores, names = outcome(recorded(loop).scores), loop.evaluator.reader.classes.names  # type: ignore[attr-defined]
    taken: set[int] = set()
    for task in range(N):
        test = loop.evaluator.tests[task]
        routes = loop.evaluator.router.routes(loop.evaluator._features[task]).best_n.tolist()
        taken |= set(routes)
        right = 0
        for row, route in enumerate(routes):
            image = test.rows.item(int(test.chosen[row]))[0]
            collator = loop.evaluator.reader.collator  # type: ignore[attr-defined]
            with loop.engine.using_adapter(loop.bank[route]), evaluating(model):
                logits: Tensor = model(pixel_values=collator.pixels([image], loop.engine.device)).logits[0]
            right += names[int(logits.argmax())] == test.examples[row].answer
        assert scores["routed", task, N - 1] == pytest.approx(100 * right / len(test))
    assert len(taken) > 1


def test_the_head_is_aligned_after_each_task(tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method="hidelora", vision=ALIGN))
    method: Any = loop.method
    heads: list[AdapterState] = []
    method.end_task = lambda engine: heads.append(read_head(engine))
    loop.run()
    assert recorded(loop).stages.count("aligning the head") == N
    now = read_head(loop.engine)
    [weight] = [name for name in now if name.endswith("weight")]
    assert not torch.isclose(heads[-1][weight], now[weight]).all(dim=1).any()  # rows of all classes have moved


def test_prompts_start_in_the_mixture(tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method="hideprompt", vision=ALIGN, hideprompt={"ensemble": 0.3}))
    frozen = frozen_weights(loop)
    starts = begun(loop, read_adapter)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_weights(loop).items())
    assert set(loop.bank[0]) == {"prompts.layer0.weight", "prompts.layer1.weight"}
    for task in range(1, N):
        for name, tensor in starts[task].items():
            mean = sum(other[name] for other in loop.bank[:task]) / task
            torch.testing.assert_close(tensor, 0.7 * loop.bank[task - 1][name] + 0.3 * mean)
            assert not torch.equal(tensor, loop.bank[task][name])


def test_text_is_learnt_too(tmp_path: Path) -> None:
    loop = build_loop(tiny_config(tmp_path, method="hidelora"))
    raw = ends(loop)
    assert [task.task for task in recorded(loop).tasks] == list(TASKS)
    assert {mode for mode, _, _ in outcome(recorded(loop).scores)} == {"last", "merged", "routed"}
    assert same_adapter(loop.bank[1], drawn(raw[1], loop.bank[:1], 0.1))


@pytest.mark.parametrize("method", ["hidelora", "hideprompt"])
def test_a_resumed_run_ends_the_same(method: str, tmp_path: Path) -> None:
    assert_resumes(prompted_config(tmp_path, method=method, vision=ALIGN), tmp_path, every=3)


@pytest.mark.parametrize("wrong", [{"start": "mean"}, {"ensemble": 1.0}, {"ensemble": -0.1}])
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        HiDeLoRAOptions(**wrong)
    with pytest.raises(ValidationError, match="layers"):
        HiDePromptOptions(layers=())
