"""From a configuration to a stream loop: model, engine, data, method, evaluator. Nothing here knows of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from treelora.adapters import LoraSpec, attach_lora, layer_names
from treelora.bandit import Search
from treelora.data.batches import BatchPlan
from treelora.data.task import Task
from treelora.data.tokenize import PromptStyle, TokenizedRows, tokenize_split
from treelora.engine import Engine, OptimizerSpec
from treelora.errors import ConfigError
from treelora.evaluation.evaluator import EvaluationOptions, Evaluator
from treelora.loop import Hooks, StreamLoop
from treelora.loop_records import LoopOptions
from treelora.memory import MemoryConfig
from treelora.methods import METHODS, Memory, Method, TreeLoRA, TreeLoRAOptions
from treelora.methods.slices import Accumulating
from treelora.methods.treelora_official import OfficialTreeLoRA
from treelora.models.causal import ModelSpec, load_model, load_tokenizer
from treelora.training_data import Split, TestSplit, Unit, choose_rows, test_split
from treelora.tree import TreeKind
from treelora_platform.config import ExperimentConfig, StreamConfig
from treelora_platform.prepare import joint_steps, steps_of

MakeEngine = Callable[[nn.Module, OptimizerSpec], Engine]
MakeMemory = Callable[[MemoryConfig], Memory]


def load_adapted_model(config: ExperimentConfig, tasks: int) -> Any:
    """The frozen base model with its LoRA adapters, with room for all tasks where a method gives each its own rank."""
    model, lora = config.model, config.lora
    times = tasks if METHODS[config.method].accumulates else 1
    spec = ModelSpec(model.name, model.dtype, model.gradient_checkpointing, model.random_weights, config.seed)
    shape = LoraSpec(times * lora.rank, times * lora.alpha, lora.dropout, lora.target_modules, lora.layers)
    return attach_lora(load_model(spec), shape, config.seed)


def optimizer_spec(config: ExperimentConfig) -> OptimizerSpec:
    """The optimizer of an experiment."""
    return OptimizerSpec(weight_decay=config.train.weight_decay, clip=config.train.clip)


def assemble(
    config: ExperimentConfig,
    tasks: list[Task],
    cache: Path,
    hooks: Hooks,
    make_engine: MakeEngine,
    make_memory: MakeMemory,
) -> StreamLoop:
    """A loop at the start of its stream. Collective.

    Args:
        cache: Folder for tokenised rows, shared by all workers.
        make_memory: Called on rank 0 only, by method `treelora`.
    """
    tokenizer = load_tokenizer(config.model.name)
    engine = make_engine(load_adapted_model(config, len(tasks)), optimizer_spec(config))
    if engine.rank != 0:
        engine.broadcast(None)  # rank 0 tokenises first, the others find its cache
    units, tests = build_data(config, tasks, tokenizer, cache)
    if engine.rank == 0:
        engine.broadcast(None)
    evaluation = config.evaluation
    evaluator = Evaluator(
        engine,
        tests,
        EvaluationOptions(
            evaluation.modes,
            evaluation.batch_rows,
            evaluation.max_new_tokens,
            evaluation.router_layer,
            evaluation.router_rows,
            evaluation.router_margin,
        ),
        tokenizer,
        tokenizer.pad_token_id,
        partitioned=config.engine.kind == "deepspeed" and config.engine.zero_stage == 3,
    )
    train = config.train
    options = LoopOptions(
        learning_rate=train.learning_rate,
        warmup=train.warmup,
        min_lr=train.min_lr,
        max_bad_steps=train.max_bad_steps,
        commit_every=config.checkpoint.every_steps,
        seed=config.seed,
        forward=evaluation.forward,
    )
    return StreamLoop(engine, _method(config, engine, make_memory), units, evaluator, options, hooks)


def memory_config(config: ExperimentConfig, engine: Engine) -> MemoryConfig:
    """The memory's settings.

    Raises:
        ConfigError: the budget is less than one task needs.
    """
    options, tensors = config.treelora, engine.adapter_tensors()
    layers = len(layer_names(list(tensors)))
    return MemoryConfig(
        layers=layers,
        sketch_size=options.sketch_size,
        tree=cast(TreeKind, options.tree),  # `official` doesn't come here
        search=cast(Search, options.search),
        blocks=options.blocks,
        exploration=options.exploration,
        bound=options.bound,
        noise=options.noise,
        max_arms=_arms_within(options, layers, tensors),
        seed=config.seed,
    )


def _arms_within(options: TreeLoRAOptions, layers: int, tensors: Mapping[str, Tensor]) -> int | None:
    """How many past tasks the budget has room for: an adapter, a sketch, and the full gradient of B where kept."""
    if options.budget_mib is None:
        return None
    numbers = sum(tensor.numel() for tensor in tensors.values()) + layers * options.sketch_size
    if options.signature == "gradient" and options.penalty in ("soft", "sign", "exact"):
        numbers += sum(tensor.numel() for name, tensor in tensors.items() if ".lora_B." in name)
    arms = int(options.budget_mib * 2**20 / (4 * numbers))
    if arms < 1:
        need = 4 * numbers / 2**20
        raise ConfigError(f"treelora.budget_mib {options.budget_mib:g}: one task takes {need:.2f} MiB; raise it")
    return arms


def _method(config: ExperimentConfig, engine: Engine, make_memory: MakeMemory) -> Method:
    if config.method == "treelora" and config.treelora.search == "official":
        return OfficialTreeLoRA(config.treelora, config.seed)
    if config.method == "treelora":
        memory = make_memory(memory_config(config, engine)) if engine.rank == 0 else None
        return TreeLoRA(config.treelora, memory, config.seed)
    kind, options = METHODS[config.method], getattr(config, config.method, None)
    if issubclass(kind, Accumulating):
        return kind(options, config.seed, rank=config.lora.rank)
    return kind(options, config.seed)


def build_data(
    config: ExperimentConfig, tasks: list[Task], tokenizer: Any, cache: Path
) -> tuple[list[Unit], list[TestSplit]]:
    """Tokenised training units and test splits of a stream, from the cache where it has them."""
    style = PromptStyle(config.model.template, config.model.system_prompt)
    refuse = config.model.long_rows == "refuse"

    def tokens(task: Task, split: str) -> TokenizedRows:
        return tokenize_split(task, split, tokenizer, style, config.model.max_length, cache, refuse_long=refuse)

    splits, tests = [], []
    for task, settings in zip(tasks, _settings_by_task(config, tasks), strict=True):
        rows = tokens(task, "train")
        splits.append(Split(rows, choose_rows(rows.labels, settings.train_rows, settings.seed)))
        tests.append(test_split(task, tokens(task, "test"), settings.test_rows, settings.seed))
    return _units(config, tasks, splits, tokenizer.pad_token_id), tests


def _settings_by_task(config: ExperimentConfig, tasks: list[Task]) -> list[StreamConfig]:
    later = [settings for settings in config.extensions for _ in settings.order]
    return [config.stream] * (len(tasks) - len(later)) + later


def _units(config: ExperimentConfig, tasks: list[Task], splits: list[Split], pad_id: int) -> list[Unit]:
    batch, accumulation = config.train.global_batch, config.train.accumulation
    sizes = [len(split) for split in splits]
    if METHODS[config.method].joint or not METHODS[config.method].trains:
        everything = tuple(range(len(tasks)))
        plan = BatchPlan(sum(sizes), batch, max_steps=joint_steps(config, sizes), seed=config.seed, task_index=0)
        return [Unit("all tasks", everything, tuple(splits), plan, pad_id, accumulation)]
    units = []
    for i, (task, split) in enumerate(zip(tasks, splits, strict=True)):
        plan = BatchPlan(len(split), batch, **steps_of(config, i, len(split)), seed=config.seed, task_index=i)
        units.append(Unit(task.name, (i,), (split,), plan, pad_id, accumulation))
    return units


def device_for(config: ExperimentConfig) -> torch.device:
    """The device of a worker: the GPU that Ray gave it, or the CPU."""
    if config.cluster.gpus_per_worker > 0:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
