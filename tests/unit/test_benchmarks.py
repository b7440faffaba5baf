"""What benchmarks count and compare, at sizes of toys: FLOPs by hand, scores by another way, which steps are taken."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from benchmarks import row_attention, turns
from benchmarks.evaluation import full_passes
from benchmarks.measure import spread
from benchmarks.shapes import Quiet, flops, train
from benchmarks.training import FIRST, Measured, Steps, bare_steps, measured, paired, report, shortened, sides
from benchmarks.turns import Side, ended, seconds_of
from tests.support.streams import build_loop, tiny_config
from treelora.evaluation.choice import score_choices
from treelora.models.packing import base_model
from treelora.models.row_attention import attend_by_row
from treelora.models.tiny import tiny_model
from treelora_platform.config import load_config
from treelora_platform.prepare import steps_of

TOY = Namespace(shape="llama-tiny", rows=4, length=32, answer=4, tasks=2, steps=6, rank=2)


def test_flops_by_hand() -> None:
    """Two layers, 64 wide with a key head of 32: q and o 64x64, k and v 64x32, three of 64x128; rank 2 at q and v."""
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    adapters = 2 * (2 * (64 + 64) + 2 * (64 + 32))
    layers = {
        f"model.layers.{i}.{name}": torch.nn.Linear(a, b, bias=False)
        for i in range(2)
        for name, a, b in (
            *(("q", 64, 64), ("o", 64, 64), ("k", 64, 32), ("v", 64, 32)),
            *(("up", 64, 128), ("gate", 64, 128), ("down", 128, 64)),
            *(("q.lora_A.x", 64, 2), ("q.lora_B.x", 2, 64), ("v.lora_A.x", 64, 2), ("v.lora_B.x", 2, 32)),
        )
    }
    layers["lm_head"] = torch.nn.Linear(64, 256, bias=False)
    engine: Any = SimpleNamespace(module=SimpleNamespace(named_modules=layers.items))
    tokens, answers = 4 * 32, 4 * (4 + 1)
    attention = 4 * 16 * 64 * 2 * tokens  # two products of 2 x 32 x 64 FLOPs a token and layer, half of them masked
    expected = 4 * weights * tokens + 4 * 64 * 256 * answers + 6 * adapters * tokens + 3 * attention
    assert flops(TOY, engine) == expected


@pytest.mark.parametrize("method", ["sequential", "treelora"])
def test_the_last_task_s_steps_are_measured(method: str) -> None:
    steps, (tokens, work) = train(TOY, method, "torch", torch.device("cpu"))
    assert [(step.task_index, step.step) for step in steps] == [(1, 4), (1, 5), (1, 6)]
    assert tokens == TOY.rows * TOY.length == steps[0].tokens
    assert work > 0
    assert (steps[0].arms is not None) == (method == "treelora")


def test_hooks_that_do_nothing_answer_everything() -> None:
    quiet = Quiet()
    assert quiet.commit(1, 2) is None
    assert quiet.router_report([]) is None


def test_three_layouts_of_rows_give_one_loss(tmp_path: Any) -> None:
    loop = build_loop(tiny_config(tmp_path))
    attend_by_row(base_model(loop.engine.module))
    unit = replace(loop.units[0], collator=replace(loop.units[0].collator, by_row=True))  # type: ignore[type-var]
    name, tokens, *ratios, apart = row_attention.measured(loop.engine.module, unit, 4)
    assert (name, float(tokens)) == ("time-colours", np.median([unit.tokens(step) for step in range(4)]))
    assert len(ratios) == 5
    assert 0 < float(apart) < 1e-5


def test_full_passes_give_the_same_scores() -> None:
    rng, model = np.random.default_rng(0), tiny_model(0).float()
    prompts = [rng.integers(1, 200, n).tolist() for n in (3, 9, 5)]
    choices = [[rng.integers(1, 200, n).tolist() for n in lengths] for lengths in ((1, 2), (3, 1, 2), (2, 2))]
    ours = score_choices(model, prompts, choices, pad_id=0)
    for at_once in (1, 3):
        for one, other in zip(ours, full_passes(model, prompts, choices, 0, at_once), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_sides_have_as_many_threads_and_the_same_batches(tmp_path: Path) -> None:
    configs = dict(sides("demo", [], tmp_path))
    assert (configs["treelora"].method, configs["treelora"].cluster.workers) == ("treelora", 1)
    threads = {config.cluster.workers * config.cluster.cpus_per_worker for config in configs.values()}
    assert threads == {2.0}
    assert len({(config.train.global_batch, config.seed) for config in configs.values()}) == 1
    assert len({config.output_dir for config in configs.values()}) == len(configs)


def test_the_first_task_is_short(tmp_path: Path) -> None:
    config = shortened(load_config("jobs/configs/demo.yaml", [f"output_dir={tmp_path}"]), 24)
    assert [steps_of(config, unit, 160)["max_steps"] for unit in range(3)] == [FIRST, 24, 24]
    whole = shortened(load_config("jobs/configs/demo.yaml", ["stream.train_rows=null"]), 24)  # rows aren't known yet
    assert steps_of(whole, 0, 160)["max_steps"] == 24


def test_ratios_of_all_starts_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    numbers, tokens = np.arange(1, 8), np.full(7, 100)

    def side(seconds: float) -> Measured:
        steps = Steps(numbers, seconds * numbers, tokens, memory=1000 * seconds, padding=0.5)
        return measured(steps, [(0, 100)])

    slow = {"treelora", "treelora, two workers", "bare, by hand"}
    names = list(dict(sides("demo", [], tmp_path)))
    starts = [{name: side(factor if name in slow else 1.0) for name in names} for factor in (1.1, 1.3, 1.2)]
    report(starts)
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.count("│") > 5}
    assert "1.10, 1.30, 1.20" in rows["a step of treelora / of sequential (s)"]
    assert "1.200 (1.100 to 1.300)" in rows["the same, two workers (s)"]
    assert "1.10, 1.30, 1.20" in rows["platform / bare loop by hand (tokens/s)"]
    assert "1.00, 1.00, 1.00" in rows["bare loop beside an idle Ray / alone (tokens/s)"]
    assert "1,200" in rows["peak memory of treelora / of sequential (MB)"]


def test_steps_are_paired_by_their_number_where_both_are_whole() -> None:
    numbers, tokens = np.arange(1, 8), np.arange(10, 80, 10)
    one = measured(Steps(numbers, np.array([0.5, 1, 2, 3, 4, 5, 7]), tokens), [(0, 5.5), (6, 8)])
    other = measured(Steps(numbers, np.array([0.5, 1, 1.5, 2, 2.5, 3, 3.5]), tokens), [(0, 4)])
    assert one.seconds == {4: 1.0, 5: 1.0, 6: 1.0}  # without the first steps of a task, and the one with a pause
    assert list(other.seconds) == [4, 5, 6, 7]
    np.testing.assert_array_equal(paired(one, other), [[1, 0.5]] * 3)
    np.testing.assert_array_equal(one.rates(), [40, 50, 60])
    assert paired(one, Measured({}, {}, one.steps)).shape == (0, 2)


def test_a_bare_loop_s_lines(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text(
        '{"kind": "step", "step": 1, "time": 2.5, "tokens": 30, "places": 40}\n'
        '{"kind": "step", "step": 2, "time": 3.5, "tokens": 45, "places": 60}\n{"kind": "step", "step": 3, "ti'
    )
    steps = bare_steps(tmp_path / "lines")
    assert steps.numbers.tolist() == [1, 2]
    assert steps.ends.tolist() == [2.5, 3.5]
    assert steps.padding == pytest.approx(0.25)


TICKS = "import sys, time\nwhile True: print(time.time(), file=open(sys.argv[1], 'a')); time.sleep(0.01)"


def test_who_is_frozen_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_END_S", 1.0)  # the children never end by themselves

    def ticks(name: str) -> np.ndarray:
        return np.array([float(line) for line in (tmp_path / name).read_text().splitlines()])

    there = []
    with ended(there):
        for name in ("one", "other"):
            # a program whose child does the work, as Ray's driver
            code = (
                f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TICKS!r}, {str(tmp_path / name)!r}])"
            )
            there.append(Side(name, [psutil.Popen([sys.executable, "-c", code])]))
            there[-1].wait_for((tmp_path / name).exists, 60)
            there[-1].freeze()
        for _ in range(2):
            for side in there:
                side.take_turn(0.5)
        processes = [process for side in there for process in side.programs]
    assert not any(process.is_running() for process in processes)
    for side in there:
        seen = ticks(side.name)
        seen = seen[(seen > there[0].turns[0][0]) & (seen < there[-1].turns[-1][1])]
        away = [min(max(begin - tick, tick - end, 0) for begin, end in side.turns) for tick in seen]
        assert len(seen) > 10
        assert max(away) < 0.1


def test_a_program_that_ends_too_soon_is_told_of() -> None:
    side = Side("short", [psutil.Popen([sys.executable, "-c", ""])])
    with ended([side]), pytest.raises(RuntimeError, match="short: ended"):
        side.wait_for(lambda: False, 60)


def test_a_step_with_a_pause_has_no_time() -> None:
    ends = np.array([1.0, 2.0, 4.0, 8.0, 9.0, 20.0])
    seconds = seconds_of(ends, [(0.5, 4.5), (7.5, 9.5)])
    np.testing.assert_array_equal(seconds, [1, 2, np.nan, 1, np.nan])


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0], 1) == "3.0 (2.0 to 4.0)"
