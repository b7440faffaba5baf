"""TreeLoRA in protected slices: what it sees, what it leaves alone, and that it takes no pass but its steps."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.reading import WIDTH, first_losses, moments, shown_tokens
from tests.support.regularising import context, row_loss, scramble
from tests.support.streams import (
    STEPS,
    TASKS,
    Recorded,
    build_loop,
    commits,
    execute,
    outcome,
    recorded,
    same_adapter,
    tiny_config,
)
from tests.unit.test_adapters import adapted
from tests.unit.test_method_slices import assert_only_b_learns
from treelora.adapters import layer_of
from treelora.engine import OptimizerSpec, TorchEngine, read_adapter
from treelora.errors import ConfigError
from treelora.loop import StreamLoop
from treelora.methods.reading import MEASURED, Reading
from treelora.methods.treelora_protected import ProtectedTreeLoRA
from treelora.objective import answer_loss
from treelora.signature import GradientProbe, adapted_modules
from treelora.sketch import CountSketch, normalise
from treelora.sliced import sliced_factors
from treelora.watching import Seen, watch
from treelora_platform.assemble import load_adapted_model

N, R = len(TASKS), 2


def protected_loop(folder: Path, treelora: dict[str, Any] | None = None, **changes: Any) -> StreamLoop:
    options = {"protect": 0.9, "probe_batches": None} | (treelora or {})
    config = tiny_config(folder, **({"lora": {"dropout": 0.0}, "treelora": options} | changes))
    return build_loop(config, Recorded())


def learn(folder: Path, **treelora: Any) -> tuple[StreamLoop, dict[str, list[Any]]]:
    """A stream to its end; adapters at the tasks' starts, the spaces kept after each, the tokens that were read."""
    loop = protected_loop(folder, treelora)
    method: Any = loop.method
    seen: dict[str, list[Any]] = {"starts": [], "spaces": [], "tokens": []}
    end_task, after_backward = method.end_task, method.after_backward

    def backward_done(engine: Any) -> None:
        after_backward(engine)
        if len(seen["starts"]) < len(seen["tokens"]):
            seen["starts"].append(read_adapter(engine))

    def ended(engine: Any) -> None:
        end_task(engine)
        seen["spaces"].append({layer: known.space for layer, known in method.spaces.layers.items()})

    method.end_task, method.after_backward = ended, backward_done
    with shown_tokens(loop) as seen["tokens"]:
        loop.run()
    return loop, seen


def begun_at(folder: Path, index: int, **train: Any) -> StreamLoop:
    """A loop within its first step of a task, past slices having random numbers."""
    loop = protected_loop(folder, train=train)
    state = scramble(loop, 0)
    loop.engine.write_adapter(
        {name: tensor * (torch.arange(N * R) < index * R) for name, tensor in state.items() if ".lora_B." in name}
    )
    loop.method.begin_task(context(loop, index), loop.engine, [])
    loop.method.before_step(1)
    return loop


def test_the_adapter_has_a_slice_for_each_task(tmp_path: Path) -> None:
    loop = protected_loop(tmp_path)
    assert isinstance(loop.method, ProtectedTreeLoRA)
    assert {tensor.shape[0] for name, tensor in read_adapter(loop.engine).items() if ".lora_A." in name} == {N * R}
    config = tiny_config(tmp_path, treelora={"protect": 0.9})
    assert load_adapted_model(config, 5).peft_config["default"].r == 5 * R


@pytest.mark.parametrize("index", range(N))
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_first_gradient_is_that_of_the_designed_a(index: int, micro_batches: int, tmp_path: Path) -> None:
    """Though A was designed behind the passes: against autograd with that A from the beginning."""
    loop = begun_at(tmp_path, index, accumulation=micro_batches)
    engine, method, task = loop.engine, loop.method, context(loop, index)
    batches, normaliser = task.micro_batches(0), task.normaliser(0)
    assert len(batches) == micro_batches
    before = read_adapter(engine)
    for batch in batches:
        engine.backward(method.loss(engine, batch, normaliser), last=batch is batches[-1])
    method.after_backward(engine)
    found = {name: gradient.clone() for name, gradient in engine.adapter_gradients().items()}
    engine.drop_gradients()
    for name, tensor in read_adapter(engine).items():
        changed = (tensor != before[name]).nonzero()[:, 0]
        assert set(changed.tolist()) == (set(range(index * R, (index + 1) * R)) if ".lora_A." in name else set())

    for batch in batches:
        engine.backward(answer_loss(engine.forward_model(), batch, normaliser), last=batch is batches[-1])
    assert found.keys() == {name for name in before if ".lora_B." in name}
    for name, gradient in engine.adapter_gradients().items():
        assert gradient.any()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_is_designed_by_inputs_that_the_loss_reads(tmp_path: Path) -> None:
    """The rows of A against the SVD of single rows' inputs, at the weights as they stand, without padding."""
    loop = begun_at(tmp_path, 1)
    engine, method, task = loop.engine, loop.method, context(loop, 1)
    modules = adapted_modules(engine.module)
    inputs: list[list[Tensor]] = [[] for _ in modules]

    def saw(layer: int, seen: Seen) -> None:
        read = seen.g.norm(dim=1) > 1e-3 * seen.g.norm(dim=1).max()
        inputs[layer].append(seen.x[read])

    for row in loop.units[1].plan.rows(0):
        handles = watch(engine.module, lambda: True, saw)
        row_loss(loop, 1, int(row))[0].backward()
        for handle in handles:
            handle.remove()
    engine.drop_gradients()
    method.before_step(1)
    engine.backward(method.loss(engine, task.micro_batches(0)[0], task.normaliser(0)), last=True)
    method.after_backward(engine)
    for (name, _), tokens in zip(modules, inputs, strict=True):
        main = torch.linalg.svd(torch.cat(tokens), full_matrices=False)[2][:R]
        own = read_adapter(engine)[f"{name}.lora_A.weight"][R : 2 * R]
        cosines = (own * main).sum(1).abs() * 3**0.5
        torch.testing.assert_close(cosines, torch.ones(R), rtol=0, atol=1e-2)


def test_a_bad_first_step_shows_nothing(tmp_path: Path) -> None:
    """The next one is the first; also where the run is interrupted between them."""
    loops = [protected_loop(tmp_path / name) for name in ("skipped", "resumed", "later")]
    tasks = [context(loop, 0) for loop in loops]

    def step(loop: StreamLoop, task: Any, number: int, factor: float) -> None:
        loop.method.before_step(number)
        loss = factor * loop.method.loss(loop.engine, task.micro_batches(number - 1)[0], task.normaliser(number - 1))
        loop.engine.backward(loss, last=True)
        if factor == 1.0:
            loop.method.after_backward(loop.engine)
            loop.engine.step(0.01)
            loop.method.after_step(loop.engine, 0.01)
        else:
            loop.engine.drop_gradients()
            loop.method.step_skipped()

    skipped, resumed, later = loops
    skipped.method.begin_task(tasks[0], skipped.engine, [])
    step(skipped, tasks[0], 1, float("nan"))
    state = {key: tensor.clone() for key, tensor in skipped.method.state_dict().items()}
    resumed.engine.write_adapter(read_adapter(skipped.engine))
    resumed.method.load_state_dict(state)
    resumed.method.resume_task(tasks[1], resumed.engine, [])
    later.method.begin_task(tasks[2], later.engine, [])
    for loop, task in zip(loops, tasks, strict=True):
        step(loop, task, 2, 1.0)
    for loop in loops[1:]:
        assert same_adapter(read_adapter(loop.engine), read_adapter(skipped.engine))
        assert torch.equal(loop.method.state_dict()["read"], skipped.method.state_dict()["read"])


def test_only_the_own_slice_s_b_trains(tmp_path: Path) -> None:
    loop, seen = learn(tmp_path)
    assert_only_b_learns(loop.bank, seen["starts"])
    for index, state in enumerate(loop.bank):
        later = slice((index + 1) * R, None)
        assert not any(tensor[:, later].any() for name, tensor in state.items() if ".lora_B." in name)


def test_a_is_orthogonal_to_what_is_protected(tmp_path: Path) -> None:
    _, seen = learn(tmp_path)
    for index in (1, 2):
        for name, start in seen["starts"][index].items():
            if ".lora_A." in name:
                own, space = start[index * R : (index + 1) * R], seen["spaces"][index - 1][layer_of(name)]
                assert 0 < space.shape[1] < WIDTH
                assert (own @ space).abs().max() < 1e-5
                torch.testing.assert_close(own @ own.T, torch.eye(R) / 3, rtol=0, atol=1e-5)


def test_what_is_protected_holds_its_share_of_the_loss_s_reading(tmp_path: Path) -> None:
    _, seen = learn(tmp_path)
    for tokens, spaces in zip(seen["tokens"], seen["spaces"], strict=True):
        m = moments(tokens)  # of so few steps each is measured
        for layer, space in enumerate(spaces.values()):
            free = torch.eye(WIDTH) - space @ space.T
            assert float((free @ m[layer] @ free).trace() / m[layer].trace()) <= 0.1 + 1e-3
            narrower = torch.eye(WIDTH) - space[:, :-1] @ space[:, :-1].T
            if tokens is seen["tokens"][0]:  # nothing was held before: one direction less is too few
                assert float((narrower @ m[layer] @ narrower).trace() / m[layer].trace()) > 0.1 - 1e-3


def test_old_tasks_hardly_feel_the_next_one(tmp_path: Path) -> None:
    """The first task's training loss after all tasks, less what it was: nothing to what unprotected slices do to it."""
    changes = []
    for share in (0.999, 1e-9):
        loop, _ = learn(tmp_path / str(share), protect=share, penalty="none")
        before, after = first_losses(loop, [loop.bank[0], loop.bank[-1]])
        changes.append(abs(after - before))
    assert changes[0] < 0.2 * changes[1], changes


def test_nothing_is_searched(tmp_path: Path) -> None:
    """The first task begins as with treelora; the signature is the same where as many batches are asked for."""
    found, signatures = {}, []
    for protect in (None, 0.9):
        loop = protected_loop(tmp_path / str(protect), {"protect": protect, "probe_batches": 2})
        loop.run()
        found[protect] = recorded(loop)
        tree = loop.method.task_tree(loop.engine)
        assert tree is not None
        assert tree.tree is not None
        signatures.append(tree.sketches)
    assert [task.passes for task in found[0.9].tasks] == [task.passes for task in found[None].tasks] == [STEPS + 2] * N
    assert all(step.arms is None for step in found[0.9].steps)
    one, other = ([step.loss for step in found[key].steps[:2]] for key in (None, 0.9))
    assert one[0] == pytest.approx(other[0], rel=1e-6)  # of the same rows at the same weights, B being zero
    assert one[1] != pytest.approx(other[1], rel=1e-6)
    assert (signatures[0] == signatures[1]).all()  # on the base weights, whoever learns


def test_the_signature_of_a_quarter_of_a_batch(tmp_path: Path) -> None:
    """Against the probe on these rows; of one pass, whatever was learnt before."""
    loop = protected_loop(tmp_path, train={"global_batch": 12})
    loop.run()
    assert [task.passes for task in recorded(loop).tasks] == [STEPS + 1] * N
    tree = loop.method.task_tree(loop.engine)
    assert tree is not None
    module = loop.engine.module
    probe, fresh = GradientProbe(module, R, 0), protected_loop(tmp_path)
    for index, signature in enumerate(tree.sketches):
        batch = context(fresh, index).fetch([(index, row) for row in (0, 8, 16)])  # of 24 rows a quarter of 12
        gradients = probe.measure(lambda batch=batch: answer_loss(module, batch, 7.0))
        expected = normalise(CountSketch(probe.layer_dims, 8, 0).sketch(gradients))
        np.testing.assert_allclose(signature, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_nothing_watches_between_tasks(tmp_path: Path) -> None:
    loop, _ = learn(tmp_path)
    assert not any(module._forward_hooks for _, module in adapted_modules(loop.engine.module))
    assert all(factor.index is None for factor in sliced_factors(loop.engine.module).values())


def test_measured_steps_are_spread_over_a_task() -> None:
    def measured(steps: int) -> list[int]:
        reading, found = Reading(TorchEngine(adapted(), OptimizerSpec()), steps, seed=0), []
        for step in range(1, steps + 1):
            reading.before_step(step)
            found += [step] * reading.measured
        return found

    assert measured(3) == [1, 2, 3]
    assert measured(4) == [1, 2, 3, 4]
    assert measured(20) == [5, 10, 15, 20]
    assert measured(30)[-1] == 30
    assert len(measured(30)) == MEASURED


def test_what_is_kept_between_tasks(tmp_path: Path) -> None:
    """Signature and protected directions; what the loss read is summed up and gone."""
    loop, seen = learn(tmp_path)
    state = loop.method.state_dict()
    directions = {f"protected/{layer}": space for layer, space in seen["spaces"][-1].items()}
    assert state.keys() - directions.keys() == {"per_batch", "sum", "seen_steps"}
    assert all(torch.equal(state[key], space) for key, space in directions.items())
    for earlier, later in pairwise(seen["spaces"]):
        assert all(torch.equal(later[layer][:, : space.shape[1]], space) for layer, space in earlier.items())


def test_prox_keeps_small_changes_at_zero(tmp_path: Path) -> None:
    strong, _ = learn(tmp_path / "strong", strength=1.0)
    weak, _ = learn(tmp_path / "weak", strength=0.0)

    def zeros(loop: StreamLoop) -> int:
        return sum(int((tensor == 0).sum()) for name, tensor in loop.bank[-1].items() if ".lora_B." in name)

    assert zeros(strong) > zeros(weak) == 0
    sparsity = [step.sparsity for step in recorded(strong).steps]
    assert all(share is not None and 0 < share <= 1 for share in sparsity)
    assert all(step.sparsity == 0 for step in recorded(weak).steps)
    last = [tensor[:, (N - 1) * R :] for name, tensor in strong.bank[-1].items() if ".lora_B." in name]
    share = sum(int((part == 0).sum()) for part in last) / sum(part.numel() for part in last)
    assert sparsity[-1] == pytest.approx(share, abs=1e-6)
    left = [step.penalty_loss for step in recorded(strong).steps]
    assert left[-1] == pytest.approx(sum(float(part.abs().sum()) for part in last), rel=1e-5)  # lambda is 1
    assert all((step.penalty_ratio or 0) > 0 for step in recorded(strong).steps)
    assert all(step.penalty_ratio == 0 for step in recorded(weak).steps)


def test_all_ways_of_inference_are_scored(tmp_path: Path) -> None:
    loop, _ = learn(tmp_path)
    scores = outcome(recorded(loop).scores)
    assert {mode for mode, _, after in scores if after == N - 1} == {"last", "merged", "routed"}


def test_too_narrow_an_adapter_is_refused(tmp_path: Path) -> None:
    loop = protected_loop(tmp_path)
    method: Any = loop.method
    method.rank = R + 1
    with pytest.raises(ConfigError, match="no slice of rank 3"):
        loop.run()


@pytest.mark.parametrize(
    ("axis", "value", "needs"),
    [
        ("signature", "gradient", "probe_b"),
        ("start", "fresh", "continue"),
        ("search", "random", "tree_lcb"),
    ],
)
def test_what_doesn_t_go_with_it_is_refused(tmp_path: Path, axis: str, value: Any, needs: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{axis} .* doesn't go with protect.*set {axis} to {needs}, or protect to null"
    ):
        tiny_config(tmp_path, treelora={"protect": 0.9, axis: value})


def test_weight_decay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.weight_decay 0\.1 would shrink"):
        tiny_config(tmp_path, treelora={"protect": 0.9}, train={"weight_decay": 0.1})


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_shares_that_make_no_sense(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match=r"treelora\.protect"):
        tiny_config(tmp_path, treelora={"protect": share})


def test_signatures_are_committed_and_found_again(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, treelora={"protect": 0.9})
    first = execute(config, tmp_path / "run")
    shutil.rmtree(commits(tmp_path / "run")[-1])  # the last task's scores weren't written
    again = execute(config, tmp_path / "run")
    one, other = (loop.method.task_tree(loop.engine) for loop in (first, again))
    assert one is not None
    assert other is not None
    assert other.groups == one.groups == ((0,), (1,), (2,))
    assert (one.sketches == other.sketches).all()
    assert len(list((tmp_path / "run" / "tree").glob("*.json"))) == N
