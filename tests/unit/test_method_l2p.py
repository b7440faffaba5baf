"""L2P: choice by brute force, who gets a gradient, the loss by hand, what stays, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from tests.support.prompted_streams import STEPS, assert_resumes, frozen_weights, prompted_config
from tests.support.streams import build_loop, outcome, recorded
from treelora.adapters import adapter_parameters
from treelora.engine import read_adapter
from treelora.evaluation.batching import evaluating
from treelora.evaluation.features import adapters_off
from treelora.methods.l2p import L2P, L2POptions
from treelora.models.vision import pooled_features

KEY, TOKENS = "prompts.key.weight", "prompts.tokens.weight"


def queries(model: Any, x: Tensor) -> Tensor:
    """Class tokens of the frozen model."""
    with evaluating(model), adapters_off(model):
        return next(iter(pooled_features(model, [x])))


def chosen_by_hand(query: Tensor, keys: Tensor, top: int) -> list[list[int]]:
    cosines = [[float(q @ k / (q.norm() * k.norm())) for k in keys.double()] for q in query.double()]
    return [sorted(range(len(keys)), key=lambda place: -row[place])[:top] for row in cosines]


def spread_keys(loop: Any, x: Tensor) -> Tensor:
    """Keys among which different images choose differently."""
    query = queries(loop.engine.module, x)
    keys = (query - 0.95 * query.mean(dim=0))[[3, 1, 2, 0, 1]] + 0.01 * torch.randn(5, query.shape[1])
    loop.engine.write_adapter({KEY: keys})
    return query


def test_top_prompts_loss_and_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = build_loop(prompted_config(tmp_path, method="l2p", l2p={"pull": 0.7}))
    method, engine = loop.method, loop.engine
    assert isinstance(method, L2P)
    [batch] = loop.units[0].micro_batches(0, 0, 1, engine.device)
    x, labels = batch["pixel_values"], batch["labels"][:, 0]  # type: ignore[typeddict-item]
    query = spread_keys(loop, x)
    tensors = adapter_parameters(engine.module)
    chosen = chosen_by_hand(query, tensors[KEY].detach(), top=2)
    used = sorted({place for row in chosen for place in row})
    assert len({tuple(row) for row in chosen}) > 1
    unused = [place for place in range(5) if place not in used]

    engine.module.train()
    method.before_step(1)
    loss = method.loss(engine, batch, 4.0)
    logits = engine.module(x).logits.detach()
    allowed = logits.masked_fill(~batch["candidates"], -torch.inf)  # type: ignore[typeddict-item]
    away = sum(
        1 - float(F.cosine_similarity(query[row], tensors[KEY].detach()[place], dim=0))
        for row, places in enumerate(chosen)
        for place in places
    )
    assert loss.item() == pytest.approx(float(F.cross_entropy(allowed, labels)) + 0.7 * away / 4, rel=1e-5)

    engine.backward(loss, last=True)
    method.after_backward(engine)
    assert float(method.metrics().scalars["penalty_loss"]) == pytest.approx(0.7 * away / 4, rel=1e-5)
    gradients = engine.adapter_gradients()
    for name in (KEY, TOKENS):
        for place in used:
            assert gradients[name][place].any(), (name, place)
        assert not gradients[name][unused].any()
    # the keys learn from their own term alone: the gradient of -cos, by hand
    place = used[0]
    key = tensors[KEY][place].detach().clone().requires_grad_()
    pulled = [row for row, places in enumerate(chosen) if place in places]
    by_hand = 0.7 / 4 * sum(1 - F.cosine_similarity(query[row], key, dim=0) for row in pulled)
    assert isinstance(by_hand, Tensor)
    torch.testing.assert_close(gradients[KEY][place], torch.autograd.grad(by_hand, key)[0], rtol=1e-4, atol=1e-6)


def test_unchosen_prompts_exist_and_stay(tmp_path: Path) -> None:
    """A step moves the chosen prompts alone: with one prompt an image of a single kind, the others keep their bits."""
    loop = build_loop(prompted_config(tmp_path, method="l2p", l2p={"top": 1, "size": 4}))
    keys = torch.zeros(4, 32)
    [batch] = loop.units[0].micro_batches(0, 0, 1, loop.engine.device)
    query = queries(loop.engine.module, batch["pixel_values"])  # type: ignore[typeddict-item]
    keys[2], keys[0], keys[1], keys[3] = query.mean(dim=0), -query[0], -query[1], -query[2]
    loop.engine.write_adapter({KEY: keys})
    before = read_adapter(loop.engine)
    loop.units = loop.units[:1]
    loop.run()
    after = loop.bank[0]
    assert [place for place in range(4) if not torch.equal(before[TOKENS][place], after[TOKENS][place])] == [2]
    assert [place for place in range(4) if not torch.equal(before[KEY][place], after[KEY][place])] == [2]


def test_a_stream(tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method="l2p"))
    frozen, head = frozen_weights(loop), {n: t.clone() for n, t in loop.engine.head_tensors().items()}
    loop.run()
    hooks = recorded(loop)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_weights(loop).items())
    assert not torch.equal(head["head.weight"], loop.engine.head_tensors()["head.weight"])
    assert {mode for mode, _, _ in outcome(hooks.scores)} == {"last", "routed"}
    # of each step's two passes one is the query's
    assert [task.passes for task in hooks.tasks] == [2 * STEPS] * 3
    assert all(step.penalty_loss and 0 < step.penalty_loss < step.loss for step in hooks.steps)
    assert len({float(state[TOKENS].sum()) for state in loop.bank}) == 3
    size = 4 * (5 * 32 + 5 * 3 * 32)
    assert [task.adapter_bytes for task in hooks.tasks] == [size, 2 * size, 3 * size]


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(prompted_config(tmp_path, method="l2p", vision={"align": True}), tmp_path)


@pytest.mark.parametrize("wrong", [{"top": 11}, {"size": 0}, {"length": 0}, {"pull": -1.0}])
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        L2POptions(**wrong)
