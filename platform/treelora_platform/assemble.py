"""From a configuration to a stream loop: model, engine, data, method, evaluator. Nothing here knows of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from treelora.adapters import LoraSpec, attach_lora, layer_names, layer_of
from treelora.alignment import HeadAlignment
from treelora.bandit import Search
from treelora.data.task import Task
from treelora.engine import Engine, OptimizerSpec
from treelora.errors import ConfigError
from treelora.evaluation.evaluator import Evaluator
from treelora.evaluation.frozen_cache import FrozenCache
from treelora.evaluation.reader import EvaluationOptions, Reader, TextReader
from treelora.guard import guard_bytes
from treelora.image_data import StreamClasses
from treelora.loop import Hooks, StreamLoop
from treelora.loop_records import LoopOptions
from treelora.memory import MemoryConfig
from treelora.methods import METHODS, Memory, Method, TreeLoRA, TreeLoRAOptions
from treelora.methods.prompting import Prompting
from treelora.methods.slices import Accumulating
from treelora.methods.treelora_guarded import GuardedTreeLoRA
from treelora.methods.treelora_official import OfficialTreeLoRA
from treelora.methods.treelora_protected import ProtectedTreeLoRA
from treelora.models.causal import load_model, load_tokenizer
from treelora.models.prompted import Prompted
from treelora.models.spec import ModelSpec
from treelora.models.vision import head_name, load_image_model
from treelora.protected_spaces import direction_bytes
from treelora.sliced import slice_adapter
from treelora.tree import TreeKind
from treelora_platform.config import ExperimentConfig
from treelora_platform.stream_data import image_data, text_data

MakeEngine = Callable[[nn.Module, OptimizerSpec], Engine]
MakeMemory = Callable[[MemoryConfig], Memory]


def load_adapted_model(config: ExperimentConfig, tasks: int, classes: int = 0) -> Any:
    """The frozen base model with its LoRA adapters or prompts, and for images a head for so many classes.

    There is room for all tasks where a method gives each its own rank or prompt.
    """
    model, lora, kind = config.model, config.lora, method_class(config)
    times = tasks if kind.accumulates else 1
    if kind is ProtectedTreeLoRA:
        times = min(tasks, config.treelora.max_slices or tasks)
    spec = ModelSpec(model.name, model.dtype, model.gradient_checkpointing, model.random_weights, config.seed)
    shape = LoraSpec(times * lora.rank, times * lora.alpha, lora.dropout, lora.target_modules, lora.layers)
    if not config.images:
        return attach_lora(load_model(spec), shape, config.seed)
    base = load_image_model(spec, classes)
    if issubclass(kind, Prompting):
        return Prompted(base, kind.prompts(getattr(config, kind.name), tasks), config.seed, kind.name)
    return attach_lora(base, shape, config.seed, head=head_name(base))


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
        cache: Folder for tokenised or decoded rows, shared by all workers.
        make_memory: Called on rank 0 only, by method `treelora`.
    """
    tokenizer = None if config.images else load_tokenizer(config.model.name)
    classes = len(StreamClasses.of(tasks).names) if config.images else 0
    module, kind = load_adapted_model(config, len(tasks), classes), method_class(config)
    if issubclass(kind, Accumulating):
        slice_adapter(module, config.lora.rank, trains_a=not kind.freezes_a)
    engine = make_engine(module, optimizer_spec(config))
    if engine.rank != 0:
        engine.broadcast(None)  # rank 0 tokenises or decodes first, the others find its cache
    options = evaluation_options(config)
    reader: Reader
    if config.images:
        units, tests, reader = image_data(config, tasks, engine, cache, options)
    else:
        units, tests = text_data(config, tasks, tokenizer, cache, engine.module)
        partitioned = config.engine.kind == "deepspeed" and config.engine.zero_stage == 3
        reader = TextReader(
            engine, tests, options, tokenizer, partitioned, FrozenCache(cache.parent / "frozen", engine.module)
        )
    if engine.rank == 0:
        engine.broadcast(None)
    alignment = HeadAlignment(config.vision, config.seed) if config.images and config.vision.align else None
    return StreamLoop(
        engine,
        make_method(config, engine, make_memory),
        units,
        Evaluator(engine, tests, options, reader),
        loop_options(config),
        hooks,
        alignment=alignment,
    )


def evaluation_options(config: ExperimentConfig) -> EvaluationOptions:
    """How rows are judged."""
    evaluation = config.evaluation
    return EvaluationOptions(
        evaluation.modes,
        evaluation.batch_rows,
        evaluation.max_new_tokens,
        evaluation.router_layer,
        evaluation.router_rows,
        evaluation.router_margin,
    )


def loop_options(config: ExperimentConfig) -> LoopOptions:
    """How a stream is trained."""
    train = config.train
    return LoopOptions(
        learning_rate=train.learning_rate,
        warmup=train.warmup,
        min_lr=train.min_lr,
        max_bad_steps=train.max_bad_steps,
        commit_every=config.checkpoint.every_steps,
        seed=config.seed,
        forward=config.evaluation.forward,
    )


def memory_config(config: ExperimentConfig, tensors: Mapping[str, Tensor]) -> MemoryConfig:
    """The memory's settings, for an adapter of these tensors.

    Raises:
        ConfigError: the budget is less than one task needs.
    """
    options, layers = config.treelora, len(layer_names(list(tensors)))
    return MemoryConfig(
        layers=layers,
        sketch_size=options.sketch_size,
        tree=cast(TreeKind, options.tree),  # `official` doesn't come here
        search=cast(Search, options.search),
        blocks=options.blocks,
        exploration=options.exploration,
        bound=options.bound,
        noise=options.noise,
        max_arms=_arms_within(options, layers, tensors) if options.protect is None else options.max_slices,
        seed=config.seed,
    )


def _arms_within(options: TreeLoRAOptions, layers: int, tensors: Mapping[str, Tensor]) -> int | None:
    """How many past tasks the budget has room for: an adapter, a sketch, and the full gradient of B where kept."""
    if options.budget_mib is None:
        return None
    numbers = sum(tensor.numel() for tensor in tensors.values()) + layers * options.sketch_size
    if options.signature == "gradient" and options.penalty in ("soft", "sign", "exact"):
        numbers += sum(tensor.numel() for name, tensor in tensors.items() if ".lora_B." in name)
    budget, beside, guard = options.budget_mib * 2**20, "", 0
    if options.guard is not None:
        guard = sum(guard_bytes(tensor.shape[1]) for name, tensor in tensors.items() if ".lora_A." in name)
        beside = f" beside the guard's {guard / 2**20:.2f}"
    arms = int((budget - guard) / (4 * numbers))
    if arms < 1:
        need = 4 * numbers / 2**20
        raise ConfigError(
            f"treelora.budget_mib {options.budget_mib:g}: one task takes {need:.2f} MiB{beside}; raise it"
        )
    return arms


def _room_for_directions(options: TreeLoRAOptions, tensors: Mapping[str, Tensor], rank: int) -> int | None:
    """The bytes that the budget leaves beside all tasks' slices and sketches.

    Raises:
        ConfigError: they aren't enough for one direction of each layer.
    """
    if options.budget_mib is None:
        return None
    factors = {layer_of(name): tensor for name, tensor in tensors.items() if ".lora_A." in name}
    widths = {layer: tensor.shape[1] for layer, tensor in factors.items()}
    slices = max(len(tensor) for tensor in factors.values()) // rank
    taken = 4 * (sum(tensor.numel() for tensor in tensors.values()) + slices * len(factors) * options.sketch_size)
    room, least = int(options.budget_mib * 2**20) - taken, sum(map(direction_bytes, widths.values()))
    if room < least:
        raise ConfigError(
            f"treelora.budget_mib {options.budget_mib:g}: {slices} slices with their sketches take "
            f"{taken / 2**20:.2f} MiB, and one protected direction a layer {least / 2**20:.2f} more; raise it, "
            "or lower treelora.max_slices"
        )
    return room


def method_class(config: ExperimentConfig) -> type[Method]:
    """What an experiment's method is implemented by."""
    if config.method == "treelora" and config.treelora.search == "official":
        return OfficialTreeLoRA
    if config.method == "treelora" and config.treelora.protect is not None:
        return ProtectedTreeLoRA
    if config.method == "treelora" and config.treelora.guard is not None:
        return GuardedTreeLoRA
    return METHODS[config.method]


def make_method(config: ExperimentConfig, engine: Engine, make_memory: MakeMemory) -> Method:
    """The method of an experiment."""
    kind, options = method_class(config), getattr(config, config.method, None)
    if kind is OfficialTreeLoRA:
        return OfficialTreeLoRA(config.treelora, config.seed)
    if config.method == "treelora":
        tensors, rank = engine.adapter_tensors(), config.lora.rank
        settings = memory_config(config, tensors)
        room = _room_for_directions(config.treelora, tensors, rank) if kind is ProtectedTreeLoRA else None
        memory = make_memory(settings) if engine.rank == 0 else None
        if kind is ProtectedTreeLoRA:
            return ProtectedTreeLoRA(config.treelora, memory, config.seed, rank=rank, room=room)
        if kind is GuardedTreeLoRA:
            return GuardedTreeLoRA(config.treelora, memory, config.seed)
        return TreeLoRA(config.treelora, memory, config.seed)
    if issubclass(kind, Accumulating):
        return kind(options, config.seed, rank=config.lora.rank)
    return kind(options, config.seed)


def device_for(config: ExperimentConfig) -> torch.device:
    """The device of a worker: the GPU that Ray gave it, or the CPU."""
    if config.cluster.gpus_per_worker > 0:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
