"""What tests of regularising, projecting and replaying methods share: a loop with a method of one's own, oracles."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.streams import Recorded, build_loop, commits, digests, same_adapter, tiny_config
from treelora.engine import TorchEngine
from treelora.loop import StreamLoop
from treelora.methods.base import Method, TaskContext
from treelora.methods.slices import Accumulating
from treelora.sliced import own_parameters, slice_adapter
from treelora_platform.config import ExperimentConfig
from treelora_platform.hooks import PlatformHooks
from treelora_platform.prepare import prepare_stream
from treelora_platform.recorder import Recorder


def loop_with(method: Method, folder: Path, hooks: Any = None, **changes: Any) -> StreamLoop:
    """The tiny stream at its start, learnt by `method`; dropout is off unless `changes` say otherwise."""
    quick = {"method": "sequential", "lora": {"dropout": 0.0}, "evaluation": {"modes": ["last"]}}
    return build_with(method, tiny_config(folder, **(quick | changes)), hooks or Recorded())


def build_with(method: Method, config: ExperimentConfig, hooks: Any) -> StreamLoop:
    """A loop at the start of the stream with a method of one's own, the adapter held as that needs it."""
    loop = build_loop(config, hooks, lambda module, spec: TorchEngine(held_for(method, module), spec))
    loop.method = method
    return loop


def held_for(method: Method, module: Any) -> Any:
    """An adapted model, its adapter in slices where the method wants them."""
    if isinstance(method, Accumulating):
        slice_adapter(module, method.rank, trains_a=not method.freezes_a)
    return module


def context(loop: StreamLoop, index: int) -> TaskContext:
    """A task of the loop as its method would see it."""
    unit = loop.units[index]
    return TaskContext(
        index=index,
        name=unit.name,
        steps=unit.plan.steps,
        micro_batches=lambda step: unit.micro_batches(step, 0, 1, loop.engine.device),
        normaliser=lambda step: unit.normaliser(step, 1),
        sizes=tuple(earlier.plan.n_rows for earlier in loop.units[: index + 1]),
        fetch=loop._fetch,
    )


def scramble(loop: StreamLoop, seed: int, size: float = 0.3) -> dict[str, Tensor]:
    """Give the adapter random values, so that no gradient vanishes, and return them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = loop.engine.adapter_tensors()
    state = {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    loop.engine.write_adapter(state)
    return state


def row_loss(loop: StreamLoop, unit: int, row: int) -> tuple[Tensor, int]:
    """-log p(answer | prompt) of a training row, without padding or batch, and its answer tokens."""
    prompt, answer = (np.asarray(ids).tolist() for ids in loop.units[unit].item(row))
    logits = loop.engine.module(input_ids=torch.tensor([prompt + answer])).logits[0]
    return F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum"), len(answer)


def gradient_of(loop: StreamLoop, loss: Tensor) -> Tensor:
    """Gradient with respect to what is trained of the adapter, as one vector."""
    gradients = torch.autograd.grad(loss, list(own_parameters(loop.engine.module).values()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def mean_gradient(loop: StreamLoop, rows: Sequence[tuple[int, int]]) -> Tensor:
    """Gradient of the mean loss over the rows' answer tokens, row by row."""
    losses, tokens = zip(*(row_loss(loop, unit, row) for unit, row in rows), strict=True)
    return gradient_of(loop, torch.stack(losses).sum() / sum(tokens))


def execute_with(method: Method, run_dir: Path, **changes: Any) -> StreamLoop:
    """Go on to the end of the stream from the newest commit in a folder, with dropout."""
    config = tiny_config(
        run_dir.parent,
        **({"method": "sequential", "lora": {"dropout": 0.1}, "evaluation": {"modes": ["last"]}} | changes),
    )
    recorder = Recorder(run_dir, list(prepare_stream(config).stream))
    hooks = PlatformHooks(run_dir, config.checkpoint.keep, recorder, None)
    loop = build_with(method, config, hooks)
    hooks.take_up(loop)
    loop.run()
    recorder.close()
    return loop


def assert_resumes(make: Callable[[], Method], folder: Path, every: int = 3, **changes: Any) -> StreamLoop:
    """A run killed after any commit (here: of each `every`) ends as the uninterrupted one, to the last bit."""
    whole = folder / "whole"
    reference = execute_with(make(), whole, **changes)
    made = commits(whole)
    expected = digests(made[-1])
    for number in range(0, len(made) - 1, every):
        again = folder / f"from-{made[number].name}"
        shutil.copytree(whole, again)
        for later in made[number + 1 :]:
            shutil.rmtree(again / "checkpoints" / later.name)
        loop = execute_with(make(), again, **changes)
        assert digests(commits(again)[-1]) == expected, made[number].name
        assert all(same_adapter(a, b) for a, b in zip(loop.bank, reference.bank, strict=True)), made[number].name
        found, wanted = loop.method.state_dict(), reference.method.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), made[number].name
    return reference
