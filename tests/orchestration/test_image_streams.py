"""Streams of images on DeepSpeed: every ZeRO stage and two ranks learn what one process of plain torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.image_streams import image_config
from tests.support.ranks import run_ranks
from tests.support.streams import Recorded
from treelora.engine import TorchEngine, read_head
from treelora.local_memory import LocalMemory
from treelora_platform.assemble import assemble
from treelora_platform.prepare import prepare_stream

ALIGNED = {"vision": {"align": True, "align_epochs": 2, "align_rows": 8, "crop_area": 0.5, "flip": True}}
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "replay, stage 0": (0, {"method": "replay", "replay": {"share": 0.5}, "vision": {"mask": "seen"}}),
    "inflora, stage 1": (1, {"method": "inflora"}),
    "treelora, stage 2": (2, ALIGNED),
    "treelora, stage 3": (3, ALIGNED),
    "ncm, stage 3": (3, {"method": "ncm"}),
}


def learn(folder: str, world: int, variant: str, make_engine: Any) -> dict[str, Any]:
    """Three tasks of two classes."""
    torch.set_num_threads(1)
    stage, changes = VARIANTS[variant]
    config = image_config(
        Path(folder),
        engine={"kind": "deepspeed", "zero_stage": stage},
        cluster={"workers": world},
        lora={"dropout": 0.0},
        **changes,
    )
    hooks, tasks = Recorded(), list(prepare_stream(config).stream)
    loop = assemble(config, tasks, Path(folder) / "pixels", hooks, lambda m, s: make_engine(m, s, config), LocalMemory)
    loop.run()
    return {
        "losses": [record.loss for record in hooks.steps],
        "norms": [record.grad_norm for record in hooks.steps],
        "scores": [score.score for score in hooks.scores],
        "head": read_head(loop.engine),
        "final": loop.bank[-1] if loop.bank else {},
        "alignment": loop.alignment.state_dict() if loop.alignment else {},
        "optimizer": loop.engine.optimizer_state(),
    }


def on_deepspeed(rank: int, world: int, folder: str) -> dict[str, Any]:
    from treelora_platform.engine import DeepSpeedEngine

    def engine(module: Any, spec: Any, config: Any) -> Any:
        return DeepSpeedEngine(module, spec, config, torch.device("cpu"))

    return {variant: learn(folder, world, variant, engine) for variant in VARIANTS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    prepare_stream(image_config(folder))  # as the driver does, before there are workers
    return run_ranks(on_deepspeed, 2, folder, str(folder))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_learn_as_one_process(variant: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = learn(str(tmp_path), 1, variant, lambda module, spec, config: TorchEngine(module, spec))
    one, other = (rank[variant] for rank in ranks)
    assert one["losses"] == other["losses"]
    assert one["scores"] == other["scores"] == alone["scores"]
    assert one["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert one["norms"] == pytest.approx(alone["norms"], rel=1e-3)
    for part in ("head", "final", "alignment", "optimizer"):
        assert one[part].keys() == alone[part].keys()
        for name, tensor in alone[part].items():
            assert torch.equal(one[part][name], other[part][name])
            torch.testing.assert_close(one[part][name], tensor, rtol=1e-3, atol=1e-4)
    assert any("classifier" in name for name in one["head"])
    assert not one["optimizer"] or any("classifier" in name for name in one["optimizer"])
