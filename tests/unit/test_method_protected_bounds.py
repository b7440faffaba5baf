"""TreeLoRA in protected slices whose number or bytes are bounded: what they come to hold, and that it stays bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.reading import first_losses
from tests.support.streams import TASKS, build_loop, execute, outcome, recorded, same_adapter, tiny_config
from tests.unit.test_adapters import update
from treelora.adapters import AdapterState, layer_names
from treelora.engine import read_adapter
from treelora.errors import ConfigError
from treelora.loop import StreamLoop
from treelora.loop_records import tensor_bytes
from treelora.protected_spaces import DIRECTIONS, READ
from treelora_platform.config import ExperimentConfig, parse_config

N, R = len(TASKS), 2
LAYERS, SKETCH = 4, 8
SLICES = 4 * 2 * (R * (32 + 32) + R * (32 + 16))
"""Bytes of a slice of the tiny model's adapter: in each of two layers q_proj is [32, 32], v_proj [16, 32]."""


def config(folder: Path, **treelora: Any) -> ExperimentConfig:
    keep = {"every_steps": 1, "keep": 1}
    return tiny_config(
        folder, lora={"dropout": 0.0}, checkpoint=keep, treelora={"protect": 0.9, "probe_batches": None} | treelora
    )


def learn(folder: Path, **treelora: Any) -> tuple[StreamLoop, list[AdapterState]]:
    """A stream to its end; the adapters at the tasks' first steps."""
    loop, starts = build_loop(config(folder, **treelora)), []
    begin_task = loop.method.begin_task

    def begun(*args: Any) -> None:
        begin_task(*args)
        starts.append(read_adapter(loop.engine))

    loop.method.begin_task = begun  # type: ignore[method-assign]
    loop.run()
    return loop, starts


def bytes_of_the_past(loop: StreamLoop) -> int:
    """Adapters, sketches, directions and what is read along them."""
    state = {key: t for key, t in loop.method.state_dict().items() if key.startswith((DIRECTIONS, READ))}
    past = loop.method.task_tree(loop.engine)
    assert past is not None
    return recorded(loop).tasks[-1].adapter_bytes + tensor_bytes(state) + past.sketches.nbytes


def updates(state: AdapterState) -> dict[str, Tensor]:
    return {layer: update(state, layer) for layer in layer_names(list(state))}


def test_a_task_without_a_slice_left_finds_the_past_condensed(tmp_path: Path) -> None:
    """Into what is nearest to it of all updates of that rank; until then nothing is as it would be without a bound."""
    free, _ = learn(tmp_path / "free")
    loop, starts = learn(tmp_path / "bound", max_slices=2)
    assert {t.shape[0] for name, t in read_adapter(loop.engine).items() if ".lora_A." in name} == {2 * R}
    both: AdapterState = {
        name: tensor[: 2 * R] if ".lora_A." in name else tensor[:, : 2 * R] for name, tensor in free.bank[1].items()
    }
    assert [s.loss for s in recorded(loop).steps[:8]] == [s.loss for s in recorded(free).steps[:8]]
    for layer, whole in updates(both).items():
        u, s, v = torch.linalg.svd(whole)
        best = (u[:, :R] * s[:R]) @ v[:R]
        torch.testing.assert_close(update(starts[2], layer), best, rtol=1e-4, atol=1e-6)
        assert float((best - whole).norm()) > 0
    for name, tensor in starts[2].items():
        if ".lora_B." in name:
            assert not tensor[:, R:].any()
            assert torch.equal(loop.bank[2][name][:, :R], tensor[:, :R])  # and stays, while the task is learnt
            assert loop.bank[2][name][:, R:].any()


def test_tasks_before_it_share_what_was_condensed(tmp_path: Path) -> None:
    loop, starts = learn(tmp_path, max_slices=2)
    assert loop.bank[0] is loop.bank[1]
    assert loop.bank[2] is not loop.bank[1]
    for layer, whole in updates(starts[2]).items():
        torch.testing.assert_close(update(loop.bank[0], layer), whole, rtol=1e-5, atol=1e-7)
    assert {mode for mode, _, after in outcome(recorded(loop).scores) if after == N - 1} == {"last", "merged", "routed"}
    past = loop.method.task_tree(loop.engine)
    assert past is not None
    assert len(past.groups) == 2  # no more sketches than slices
    assert sorted(task for group in past.groups for task in group) == [0, 1, 2]


@pytest.mark.parametrize("slices", [N, N + 4, None])
def test_enough_slices_change_nothing(slices: int | None, tmp_path: Path) -> None:
    one, _ = learn(tmp_path / "one")
    other, _ = learn(tmp_path / "other", max_slices=slices)
    assert all(same_adapter(a, b) for a, b in zip(one.bank, other.bank, strict=True))


def test_a_condensed_past_is_hardly_forgotten(tmp_path: Path) -> None:
    """The first task's loss after all three, with two slices and with three, beside the loss of nothing learnt."""
    losses = []
    for slices in (None, 2):
        loop, _ = learn(tmp_path / str(slices), max_slices=slices, protect=0.999)
        learnt = read_adapter(loop.engine)
        loss, base = first_losses(loop, [learnt, {name: torch.zeros_like(t) for name, t in learnt.items()}])
        losses.append(loss)
    whole, bound = losses
    assert abs(bound - whole) < 0.2 * abs(base - whole), (whole, bound, base)


@pytest.mark.parametrize("extra", [0.0002, 0.001, 1.0])
@pytest.mark.parametrize("slices", [2, None])
def test_the_past_takes_no_more_than_the_budget(slices: int | None, extra: float, tmp_path: Path) -> None:
    kept = slices or N
    least = kept * SLICES + kept * LAYERS * SKETCH * 4 + LAYERS * 4 * 33
    budget = least / 2**20 + extra
    loop, _ = learn(tmp_path, max_slices=slices, budget_mib=budget)
    assert bytes_of_the_past(loop) <= budget * 2**20
    if extra < 0.01:
        assert bytes_of_the_past(loop) > budget * 2**20 - 4 * 33  # and as much of it as there is to keep
    else:
        free, _ = learn(tmp_path / "free", max_slices=slices)
        spaces: Any = free.method
        for layer, known in loop.method.spaces.layers.items():  # type: ignore[attr-defined]
            assert known.space.shape == spaces.spaces.space(layer).shape


@pytest.mark.parametrize("slices", [2, None])
def test_a_budget_without_room_for_a_direction_a_layer_is_refused(slices: int | None, tmp_path: Path) -> None:
    kept = slices or N
    least = kept * SLICES + kept * LAYERS * SKETCH * 4 + LAYERS * 4 * 33
    build_loop(config(tmp_path, max_slices=slices, budget_mib=least / 2**20))
    with pytest.raises(
        ConfigError, match=rf"budget_mib .*: {kept} slices with their sketches take .*; raise it, or lower"
    ):
        build_loop(config(tmp_path, max_slices=slices, budget_mib=(least - 1) / 2**20))


def test_slices_without_protection_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_slices 3: only protect has slices; set max_slices to null"):
        tiny_config(tmp_path, treelora={"max_slices": 3})
    with pytest.raises(ConfigError, match=r"treelora\.max_slices"):
        tiny_config(tmp_path, treelora={"protect": 0.9, "max_slices": 1})


def test_an_extended_run_keeps_to_its_slices(tmp_path: Path) -> None:
    """Two tasks fill them; the third, learnt later, finds the past condensed, as in one go."""
    whole = config(tmp_path / "whole", max_slices=2, budget_mib=0.01)
    straight = execute(whole, tmp_path / "whole" / "run")
    plain = whole.as_dict()
    first = parse_config(plain | {"stream": plain["stream"] | {"order": TASKS[:2]}})
    execute(first, tmp_path / "run")
    extension = {key: plain["stream"][key] for key in ("source", "train_rows", "test_rows", "seed")}
    longer = parse_config(first.as_dict() | {"extensions": [extension | {"order": TASKS[2:]}]})
    extended = execute(longer, tmp_path / "run")
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == len({id(state) for state in extended.bank}) == 2
    assert all(same_adapter(a, b) for a, b in zip(extended.bank, straight.bank, strict=True))
