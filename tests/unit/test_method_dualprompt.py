"""DualPrompt: whose prompt is learnt and whose is used, what later tasks leave alone, starts, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from tests.support.prompted_streams import STEPS, assert_resumes, begun, frozen_weights, prompted_config
from tests.support.streams import build_loop, recorded
from tests.unit.test_method_l2p import queries
from treelora.engine import read_adapter
from treelora.evaluation.batching import evaluating
from treelora.methods.dualprompt import KEY, DualPromptOptions
from treelora.models.prompted import fresh_prompts

EXPERT, GENERAL = "prompts.layer1.weight", "prompts.general0.weight"
N = 3


def test_later_tasks_leave_a_task_s_prompt_and_key_alone(tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method="dualprompt"))
    frozen = frozen_weights(loop)
    starts = begun(loop, read_adapter)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_weights(loop).items())
    for task in range(N):
        for name in (KEY, EXPERT):
            assert not torch.equal(loop.bank[task][name][task], starts[task][name][task])  # it has learnt
            for later in loop.bank[task + 1 :]:
                assert torch.equal(later[name][task], loop.bank[task][name][task])
            assert not loop.bank[task][name][task + 1 :].any()  # and no other has come yet
    for one, other in zip(loop.bank, loop.bank[1:], strict=False):
        assert not torch.equal(one[GENERAL], other[GENERAL])  # all tasks share it
    size = 4 * (N * 32 + N * 2 * 3 * 32 + 2 * 2 * 32)
    assert [(task.passes, task.adapter_bytes) for task in recorded(loop).tasks] == [(2 * STEPS, size)] * N


@pytest.mark.parametrize("start", ["previous", "fresh"])
def test_where_a_task_s_prompt_and_key_start(start: str, tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method="dualprompt", dualprompt={"start": start}))
    starts = begun(loop, read_adapter)
    fresh = {name: fresh_prompts(name.removesuffix(".weight"), loop.bank[0][name].shape, 0) for name in (KEY, EXPERT)}
    for task in range(N):
        assert torch.equal(starts[task][KEY][task], fresh[KEY][task])
        goes_on = start == "previous" and task > 0
        expected = loop.bank[task - 1][EXPERT][task - 1] if goes_on else fresh[EXPERT][task]
        assert torch.equal(starts[task][EXPERT][task], expected)


def test_training_uses_the_newest_prompt_and_a_test_the_nearest_that_has_come(tmp_path: Path) -> None:
    loop = build_loop(prompted_config(tmp_path, method="dualprompt", dualprompt={"pull": 0.5}))
    engine, method = loop.engine, loop.method
    model: Any = engine.module
    [batch] = loop.units[0].micro_batches(0, 0, 1, engine.device)
    x = batch["pixel_values"]  # type: ignore[typeddict-item]
    query = queries(model, x)
    keys = torch.zeros(N, 32)
    keys[:2] = (query - 0.95 * query.mean(dim=0))[:2]
    expert = torch.randn(N, 2, 3, 32, generator=torch.Generator().manual_seed(0))
    engine.write_adapter({KEY: keys, EXPERT: expert})
    cosines = F.cosine_similarity(query[:, None], keys[None, :2], dim=-1)
    # the third key is nearer to a row than one with a negative cosine, but its task hasn't come
    engine.write_adapter({KEY: torch.stack([-keys[0], -keys[1], keys[2]])})
    nearest = (-cosines).argmax(dim=1).tolist()
    assert set(nearest) == {0, 1}
    assert (-cosines).amax(dim=1).min() < 0

    def logits_with(place: int) -> torch.Tensor:
        """All rows with one prompt: that of the only task that has come."""
        only = torch.zeros(N, 32)
        only[0] = 1.0
        with engine.using_adapter({KEY: only, EXPERT: expert.roll(-place, dims=0)}), evaluating(model):
            return model(x).logits

    with evaluating(model):
        found = model(x)
    for row, place in enumerate(nearest):
        torch.testing.assert_close(found.logits[row], logits_with(place)[row])
        assert float(found.similarity[row, 0]) == pytest.approx(-float(cosines[row, place]), abs=1e-5)

    model.train()
    method.before_step(1)
    loss = method.loss(engine, batch, 4.0)
    allowed = logits_with(1).masked_fill(~batch["candidates"], -torch.inf)  # type: ignore[typeddict-item]
    labels = batch["labels"][:, 0]
    pulled = 0.5 * float((1 + cosines[:, 1]).sum()) / 4
    assert loss.item() == pytest.approx(float(F.cross_entropy(allowed, labels)) + pulled, rel=1e-5)
    engine.backward(loss, last=True)
    gradients = engine.adapter_gradients()
    for name in (KEY, EXPERT):
        assert [place for place in range(N) if gradients[name][place].any()] == [1]
    assert gradients[GENERAL].any()


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(prompted_config(tmp_path, method="dualprompt"), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": [1, 2]}, "layer 1 is in layers and in general_layers; take it out of one"),
        ({"layers": []}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"length": 0}, "length"),
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DualPromptOptions(**wrong)
