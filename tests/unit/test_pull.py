"""Penalties on an engine: the exact one against double backward, a pull of `query` against a gradient by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.streams import STEPS, build_loop, recorded, tiny_config
from treelora.adapters import adapter_parameters, layer_of
from treelora.engine import read_adapter
from treelora.loop import StreamLoop
from treelora.methods.extra_gradient import adapter_gradient, flatten
from treelora.methods.treelora_pull import hessian_pull, pull_gradients
from treelora.objective import answer_loss
from treelora.sketch import normalise, residual


@pytest.fixture
def loop(tmp_path: Path) -> StreamLoop:
    """A tiny model whose B isn't zero, without dropout, with an attention that has second derivatives."""
    loop = build_loop(tiny_config(tmp_path, lora={"rank": 2, "alpha": 8, "dropout": 0.0}))
    loop.engine.module.base_model.model.set_attn_implementation("eager")  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(1)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in read_adapter(loop.engine).items()
    }
    loop.engine.write_adapter(state)
    return loop


def losses_of(loop: StreamLoop, unit: int = 0, step: int = 0) -> list[Any]:
    batches = loop.units[unit].micro_batches(step, 0, 1, loop.engine.device)
    return [partial(answer_loss, loop.engine.module, batch, loop.units[unit].normaliser(step, 1)) for batch in batches]


def exact_product(loop: StreamLoop, direction: dict[str, torch.Tensor]) -> torch.Tensor:
    parameters = adapter_parameters(loop.engine.module)
    total = torch.stack([loss() for loss in losses_of(loop)]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), create_graph=True)
    inner = sum((g * direction[name]).sum() for name, g in zip(parameters, gradients, strict=True))
    product = torch.autograd.grad(inner, list(parameters.values()))  # type: ignore[arg-type]
    return torch.cat([part.reshape(-1) for part in product])


def test_the_exact_penalty_is_the_hessian_times_the_signs(loop: StreamLoop) -> None:
    gradients = adapter_gradient(loop.engine, losses_of(loop))
    arm = {name: 0.5 * g.roll(1, 0) for name, g in gradients.items() if ".lora_B." in name}
    direction = {
        name: torch.sign(g - arm[name]) if name in arm else torch.zeros_like(g) for name, g in gradients.items()
    }
    before = read_adapter(loop.engine)
    added = flatten(hessian_pull(loop.engine, gradients, arm, 0.5, losses_of(loop)))
    expected = exact_product(loop, direction)
    assert torch.nn.functional.cosine_similarity(added, expected, dim=0) > 0.9999
    torch.testing.assert_close(added.norm(), 0.5 * flatten(gradients).norm())  # rescaled to lambda ||g||
    after = read_adapter(loop.engine)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_no_difference_no_penalty(loop: StreamLoop) -> None:
    gradients = adapter_gradient(loop.engine, losses_of(loop))
    arm = {name: g.clone() for name, g in gradients.items() if ".lora_B." in name}
    assert not flatten(hessian_pull(loop.engine, gradients, arm, 0.5, losses_of(loop))).any()


@pytest.mark.parametrize("kind", ["soft", "sign", "exact"])
def test_diagnostics_say_what_was_added(loop: StreamLoop, kind: str) -> None:
    losses = losses_of(loop)
    torch.stack([loss() for loss in losses]).sum().backward()
    gradients = {name: g.clone() for name, g in loop.engine.adapter_gradients().items()}
    arm = {name: -g for name, g in gradients.items() if ".lora_B." in name}
    scalars = pull_gradients(loop.engine, kind, gradients, arm, 0.2, losses)
    changed = flatten(loop.engine.adapter_gradients())
    moved = (changed - flatten(gradients)).norm() / flatten(gradients).norm()
    assert float(scalars["penalty_ratio"]) == pytest.approx(float(moved), rel=1e-4)
    apart = sum(float((gradients[name] - arm[name]).abs().sum()) for name in arm)
    assert float(scalars["penalty_loss"]) == pytest.approx(0.2 * apart, rel=1e-5)
    if kind != "soft":  # both rescale; `sign` each tensor of B, which leaves out A's share of the norm
        assert float(scalars["penalty_ratio"]) <= 0.2 + 1e-5


def test_adapter_gradient_is_the_gradient_and_leaves_no_trace(loop: StreamLoop) -> None:
    found = adapter_gradient(loop.engine, losses_of(loop))
    assert all(p.grad is None for p in adapter_parameters(loop.engine.module).values())
    torch.stack([loss() for loss in losses_of(loop)]).sum().backward()
    expected = loop.engine.adapter_gradients()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_pull_of_query_is_a_pass_at_the_arms_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"signature": "query", "penalty": "none", "search": "flat_lcb"}
    loop = build_loop(tiny_config(tmp_path, treelora=changes, lora={"rank": 2, "alpha": 8, "dropout": 0.0}))
    method: Any = loop.method
    seen, after_backward = [], method.after_backward

    def spy(engine: Any) -> None:
        after_backward(engine)
        if loop.position.unit < 2:
            return
        arms, step = method.arms_L, method._step
        names = list(read_adapter(engine))
        layers = list(dict.fromkeys(layer_of(name) for name in names))
        mixed = {name: loop.bank[arms[layers.index(layer_of(name))]][name] for name in names}
        kept = read_adapter(engine)
        own = {name: g.clone() for name, g in engine.adapter_gradients().items()}
        engine.write_adapter(mixed)
        asked = adapter_gradient(engine, losses_of(loop, 2, step - 1))
        engine.write_adapter(kept)
        sketches = [normalise(method.source._count_sketch.sketch(method.source._vectors(g))) for g in (own, asked)]
        seen.append((method._observation, residual(sketches[0], sketches[1][None])[0].numpy()))

    monkeypatch.setattr(method, "after_backward", spy)
    loop.run()
    assert len(seen) == STEPS
    for observed, expected in seen:
        torch.testing.assert_close(torch.from_numpy(observed), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    passes = [task.passes for task in recorded(loop).tasks]
    assert passes == [STEPS, 2 * STEPS, 2 * STEPS + STEPS]  # the last are this test's own


def test_query_and_full_asks_every_arm(tmp_path: Path) -> None:
    loop = build_loop(tiny_config(tmp_path, treelora={"signature": "query", "penalty": "none", "search": "full"}))
    loop.run()
    assert [task.passes for task in recorded(loop).tasks] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert loop.method.memory.describe()["tasks"] == [unit.name for unit in loop.units]  # type: ignore[attr-defined]
