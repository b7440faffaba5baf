"""The two engines agree: every ZeRO stage, one and two workers, and plain torch, at equal global batch.

Each number of workers is one spawn that runs all cases; the tests look at what it brought back.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.streams import Recorded, tiny_config
from treelora.adapters import LoraSpec, attach_lora
from treelora.engine import OptimizerSpec, TorchEngine, read_adapter
from treelora.local_memory import LocalMemory
from treelora.loop import StreamLoop
from treelora.loop_records import StepRecord
from treelora.models.tiny import tiny_model
from treelora.objective import answer_loss
from treelora.signature import GradientProbe
from treelora_platform.assemble import assemble
from treelora_platform.config import parse_config
from treelora_platform.prepare import prepare_stream

STEPS, ROWS, WIDTH, LR = 4, 4, 12, 1e-2
SPEC = OptimizerSpec(clip=0.5)
CASES = [(stage, accumulation) for stage in range(4) for accumulation in (1, 2)]
OFFLOADED: dict[int, dict[str, Any]] = {
    2: {"zero_stage": 2, "offload_optimizer": True},
    3: {"zero_stage": 3, "offload_optimizer": True, "offload_weights": True},
}


def batch(step: int, rows: slice) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 256, (ROWS, WIDTH), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    whole = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(WIDTH).expand(ROWS, WIDTH),
        "labels": labels,
    }
    return {name: tensor[rows] for name, tensor in whole.items()} | {"answer_width": 2}


def model() -> Any:
    return attach_lora(tiny_model(3), LoraSpec(rank=2, alpha=4), seed=5)


class Worker:
    """One rank's view of an engine: the same few lines as the loop's step."""

    def __init__(self, engine: Any, rank: int = 0, world: int = 1, accumulation: int = 1):
        self.engine, self.rank, self.world, self.accumulation = engine, rank, world, accumulation
        self.norms: list[float] = []

    def parts(self, step: int) -> list[dict[str, Any]]:
        share = ROWS // (self.world * self.accumulation)
        starts = [(self.rank * self.accumulation + micro) * share for micro in range(self.accumulation)]
        return [batch(step, slice(start, start + share)) for start in starts]

    def backward(self, step: int, factor: float = 1.0) -> float:
        total, parts = torch.zeros(()), self.parts(step)
        for micro, part in enumerate(parts):
            loss = factor * answer_loss(self.engine.forward_model(), part, ROWS * 2 / self.world)  # type: ignore
            self.engine.backward(loss, last=micro == len(parts) - 1)
            total += loss.detach()
        return float(self.engine.all_reduce(total, mean=True))

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(self.backward(step))
            self.norms.append(float(self.engine.step(LR)))
        return losses

    def probe(self) -> torch.Tensor:
        probe = GradientProbe(self.engine.module, 2, 7)
        module, normaliser = self.engine.module, ROWS * 2 / self.world
        measured = [probe.measure(partial(answer_loss, module, part, normaliser)) for part in self.parts(9)]  # type: ignore
        flat = torch.stack([torch.cat([layer.flatten() for layer in one]) for one in measured]).sum(0)
        return self.engine.all_reduce(flat, mean=True)

    def go_through(self) -> dict[str, Any]:
        """Everything that is compared, from a fresh engine on."""
        engine = self.engine
        found: dict[str, Any] = {"losses": self.train(range(2))}
        kept_adapter, kept_moments = read_adapter(engine), engine.optimizer_state()
        found["losses"] += self.train(range(2, STEPS))
        found |= {"final": read_adapter(engine), "norms": torch.tensor(self.norms), "moments": kept_moments}

        zeros = {name: torch.zeros_like(tensor) for name, tensor in found["final"].items()}
        with engine.using_adapter(zeros):
            found["swapped"] = answer_loss(engine.module, batch(0, slice(None)), 1.0).detach()  # type: ignore
        back = read_adapter(engine)
        found["restored"] = all(torch.equal(tensor, found["final"][name]) for name, tensor in back.items())
        found["probe"] = self.probe()

        def rewind() -> None:
            engine.write_adapter(kept_adapter)
            engine.load_optimizer_state(kept_moments)

        rewind()
        found["again"] = self.train(range(2, STEPS))

        rewind()
        self.backward(2)
        gradients = {name: tensor.detach().clone() for name, tensor in engine.adapter_gradients().items()}
        edited = {name: -3.0 * tensor for name, tensor in gradients.items() if "lora_B" in name}
        engine.set_adapter_gradients(edited)
        engine.step(LR)
        found |= {"gradients": gradients, "edited": read_adapter(engine)}

        rewind()
        self.backward(2, factor=math.nan)
        engine.drop_gradients()
        found["dropped"] = all(torch.equal(t, kept_adapter[name]) for name, t in read_adapter(engine).items())
        found["after_drop"] = self.train(range(2, STEPS))

        rewind()
        self.backward(2)
        [first, *_] = engine.adapter_gradients().items()
        engine.set_adapter_gradients({first[0]: torch.full_like(first[1], math.inf)})
        found["infinite_norm"] = float(engine.step(LR))
        found["unmoved"] = all(torch.equal(t, kept_adapter[name]) for name, t in read_adapter(engine).items())
        found["after_infinity"] = self.train(range(2, STEPS))

        rewind()
        engine.reset_optimizer()
        self.train(range(2, STEPS))
        found["reset"] = read_adapter(engine)
        return found


class Arms(Recorded):
    """Keeps the arms as this rank's method has them, not as rank 0 reports them."""

    loop: StreamLoop

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def stepped(self, record: StepRecord, steps: int) -> None:
        super().stepped(record, steps)
        self.seen += getattr(self.loop.method, "arms_L", torch.zeros(0)).tolist()


STREAMS: dict[str, tuple[int, dict[str, Any]]] = {
    "prox": (2, {"search": "flat_lcb", "exploration": 0.0}),
    "query soft": (3, {"guard": None, "signature": "query", "penalty": "soft", "search": "full"}),
    "exact": (1, {"preset": "paper", "exploration": 0.0, "strength": 0.1}),
    "official": (2, {"preset": "official"}),
}
"""ZeRO stage and settings of method treelora."""
PEERS = ("agem", "gem", "ewc", "ogd", "lwf", "replay")
"""Methods that take gradients beside the step's or read the adapter's parameters, all with sharded weights."""


def whole_stream(folder: str, world: int, variant: str, make_engine: Any) -> dict[str, Any]:
    """Three tasks with one method; where that is treelora, with the memory on rank 0."""
    hooks = Arms()
    method = variant if variant in PEERS else "treelora"
    stage, settings = (3, {}) if variant in PEERS else STREAMS[variant]
    config = tiny_config(
        Path(folder),
        method=method,
        engine={"kind": "deepspeed", "zero_stage": stage},
        cluster={"workers": world},
        lora={"dropout": 0.0},
        **{method: settings},
    )
    tasks = list(prepare_stream(config).stream)

    def engine(module: Any, spec: OptimizerSpec) -> Any:
        return make_engine(module, spec, config)

    hooks.loop = assemble(config, tasks, Path(folder) / "tokens", hooks, engine, LocalMemory)
    hooks.loop.run()
    return {
        "arms": hooks.seen,
        "losses": [record.loss for record in hooks.steps],
        "scores": [score.score for score in hooks.scores],
        "final": hooks.loop.bank[-1],
        "has_memory": getattr(hooks.loop.method, "memory", None) is not None,
    }


def on_deepspeed(rank: int, world: int, folder: str) -> dict[str, Any]:
    from treelora_platform.engine import DeepSpeedEngine

    results: dict[str, Any] = {}
    for variant in (*STREAMS, *(PEERS if world > 1 else ())):
        results[variant] = whole_stream(
            folder,
            world,
            variant,
            lambda module, spec, config: DeepSpeedEngine(module, spec, config, torch.device("cpu")),
        )
    for stage, accumulation in CASES:
        config = parse_config(
            {
                "engine": {"zero_stage": stage},
                "train": {"global_batch": ROWS, "accumulation": accumulation, "steps": STEPS, "clip": SPEC.clip},
                "cluster": {"workers": world},
            }
        )

        def engine(config: Any = config) -> Any:
            return DeepSpeedEngine(model(), SPEC, config, torch.device("cpu"))

        found = Worker(engine(), rank, world, accumulation).go_through()
        first = Worker(engine(), rank, world, accumulation)
        first.train(range(2))
        adapter, moments = read_adapter(first.engine), first.engine.optimizer_state()
        other = Worker(engine(), rank, world, accumulation)
        other.engine.write_adapter(adapter)
        other.engine.load_optimizer_state(moments)
        found["resumed"] = other.train(range(2, STEPS))
        results[f"{stage} {accumulation}"] = found
    for stage, settings in OFFLOADED.items():
        train = {"global_batch": ROWS, "steps": STEPS, "clip": SPEC.clip}
        config = parse_config({"engine": settings, "train": train, "cluster": {"workers": world}})
        worker = Worker(DeepSpeedEngine(model(), SPEC, config, torch.device("cpu")), rank, world)
        results[f"offloaded {stage}"] = worker.go_through()
    return results


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    torch.set_num_threads(1)
    return Worker(TorchEngine(model(), SPEC)).go_through()


@pytest.fixture(scope="module", params=[1, 2], ids=["1 worker", "2 workers"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    prepare_stream(tiny_config(folder))  # as the driver does, before there are workers
    return run_ranks(on_deepspeed, request.param, folder, str(folder))


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("variant", STREAMS)
def test_ranks_agree_on_every_arm_and_with_one_process(
    ranks: list[dict[str, Any]], tmp_path: Path, variant: str
) -> None:
    streams = [rank[variant] for rank in ranks]
    one = streams[0]
    expected = [True, False][: len(ranks)] if variant != "official" else [False] * len(ranks)
    assert [stream["has_memory"] for stream in streams] == expected
    alone = whole_stream(str(tmp_path), 1, variant, lambda module, spec, config: TorchEngine(module, spec))
    layers = 4
    assert len(one["arms"]) == 2 * STEPS * layers
    assert set(one["arms"]) == {0, 1}
    # Adam magnifies the last bits of small gradients; a finite difference magnifies them once more
    close(one["final"], alone["final"], 5e-3 if variant == "exact" else 1e-4)
    for stream in streams:
        assert stream["arms"] == alone["arms"]
        assert stream["losses"] == pytest.approx(alone["losses"], rel=1e-3 if variant == "exact" else 1e-4)
        assert stream["scores"] == alone["scores"]
        assert stream["losses"] == one["losses"]
        assert all(torch.equal(tensor, one["final"][name]) for name, tensor in stream["final"].items())


@pytest.mark.parametrize("ranks", [2], ids=["2 workers"], indirect=True)  # one worker has all weights
@pytest.mark.parametrize("variant", PEERS)
def test_peers_compute_the_same_with_sharded_weights(ranks: list[dict[str, Any]], tmp_path: Path, variant: str) -> None:
    alone = whole_stream(str(tmp_path), 1, variant, lambda module, spec, config: TorchEngine(module, spec))
    for stream in (rank[variant] for rank in ranks):
        assert stream["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        close(stream["final"], alone["final"], 5e-4)  # Adam magnifies small gradients' last bits; more on some CPUs


@pytest.mark.parametrize("stage", OFFLOADED)
def test_offloading_changes_no_number(ranks: list[dict[str, Any]], reference: dict[str, Any], stage: int) -> None:
    for found in (rank[f"offloaded {stage}"] for rank in ranks):
        assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert found["again"] == found["losses"][2:]
        close(found["final"], reference["final"], 1e-6)
        close(found["moments"], reference["moments"], 1e-8)


@pytest.mark.parametrize(("stage", "accumulation"), CASES)
class TestEveryStage:
    def case(self, ranks: list[dict[str, Any]], stage: int, accumulation: int) -> list[dict[str, Any]]:
        return [rank[f"{stage} {accumulation}"] for rank in ranks]

    def test_trains_as_plain_torch(
        self, ranks: list[dict[str, Any]], reference: dict[str, Any], stage: int, accumulation: int
    ) -> None:
        for found in self.case(ranks, stage, accumulation):
            assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
            torch.testing.assert_close(found["norms"], reference["norms"], rtol=1e-4, atol=1e-7)
            close(found["final"], reference["final"], 1e-6)
            close(found["moments"], reference["moments"], 1e-8)
            assert float(found["moments"]["step"]) == 2

    def test_goes_back_to_a_state_exactly(
        self, ranks: list[dict[str, Any]], reference: dict[str, Any], stage: int, accumulation: int
    ) -> None:
        for found in self.case(ranks, stage, accumulation):
            assert found["again"] == found["losses"][2:]
            assert found["resumed"] == found["losses"][2:]
            close(found["reset"], reference["reset"], 1e-6)

    def test_computes_with_another_adapter_and_returns(
        self, ranks: list[dict[str, Any]], reference: dict[str, Any], stage: int, accumulation: int
    ) -> None:
        for found in self.case(ranks, stage, accumulation):
            assert found["restored"]
            torch.testing.assert_close(found["swapped"], reference["swapped"])

    def test_reads_and_edits_gradients(
        self, ranks: list[dict[str, Any]], reference: dict[str, Any], stage: int, accumulation: int
    ) -> None:
        for found in self.case(ranks, stage, accumulation):
            close(found["gradients"], reference["gradients"], 1e-7)
            close(found["edited"], reference["edited"], 1e-6)
        biased = [name for name in reference["edited"] if "lora_B" in name]
        assert not any(torch.allclose(reference["edited"][name], reference["final"][name]) for name in biased)

    def test_measures_probes(
        self, ranks: list[dict[str, Any]], reference: dict[str, Any], stage: int, accumulation: int
    ) -> None:
        for found in self.case(ranks, stage, accumulation):
            torch.testing.assert_close(found["probe"], reference["probe"], rtol=1e-4, atol=1e-7)

    def test_forgets_a_step_without_a_trace(
        self, ranks: list[dict[str, Any]], reference: dict[str, Any], stage: int, accumulation: int
    ) -> None:
        for found in self.case(ranks, stage, accumulation):
            assert found["dropped"]
            assert found["after_drop"] == found["again"]

    def test_takes_no_step_along_an_infinite_gradient(
        self, ranks: list[dict[str, Any]], reference: dict[str, Any], stage: int, accumulation: int
    ) -> None:
        for found in [reference, *self.case(ranks, stage, accumulation)]:
            assert not math.isfinite(found["infinite_norm"])
            assert found["unmoved"]
            assert found["after_infinity"] == found["again"]
