"""A configuration's data as the loop takes it: chosen rows of tokenised or decoded splits, in units to be learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from treelora.data.batches import BatchPlan
from treelora.data.images.pixels import pixel_rows
from treelora.data.task import Task
from treelora.data.tokenize import PromptStyle, TokenizedRows, tokenize_split
from treelora.engine import Engine
from treelora.evaluation.image_reader import ImageReader, NearestMeanReader
from treelora.evaluation.reader import EvaluationOptions
from treelora.image_data import ImageCollator, StreamClasses, StreamImages, stored_side, training_candidates
from treelora.methods import METHODS
from treelora.models.causal import can_pack
from treelora.models.packing import mask_dtype
from treelora.models.row_attention import attends_by_row
from treelora.models.spec import DTYPES
from treelora.models.vision import image_format, patches, processor_format
from treelora.training_data import (
    Collator,
    Split,
    TestSplit,
    TextCollator,
    Unit,
    choose_rows,
    image_test_split,
    test_split,
)
from treelora_platform.config import ExperimentConfig, StreamConfig
from treelora_platform.prepare import joint_steps, steps_of


def text_data(
    config: ExperimentConfig, tasks: list[Task], tokenizer: Any, cache: Path, model: nn.Module
) -> tuple[list[Unit], list[TestSplit]]:
    """Tokenised training units and test splits of a stream, from the cache where it has them.

    Training rows are packed where the model can take them so.
    """
    style = PromptStyle(config.model.template, config.model.system_prompt)
    refuse = config.model.long_rows == "refuse"

    def tokens(task: Task, split: str) -> TokenizedRows:
        return tokenize_split(task, split, tokenizer, style, config.model.max_length, cache, refuse_long=refuse)

    splits, tests = [], []
    for task, settings in zip(tasks, settings_by_task(config, tasks), strict=True):
        rows = tokens(task, "train")
        splits.append(Split(rows, choose_rows(rows.labels, settings.train_rows, settings.seed)))
        tests.append(test_split(task, tokens(task, "test"), settings.test_rows, settings.seed))
    longest = config.model.max_length
    packs, by_row = mask_dtype(model) if can_pack(model, longest) else None, attends_by_row(model, longest)
    collator = TextCollator(tokenizer.pad_token_id, packs, by_row)
    return build_units(config, tasks, splits, lambda unit: collator), tests


def settings_by_task(config: ExperimentConfig, tasks: list[Task]) -> list[StreamConfig]:
    """For each task the section that brought it."""
    later = [settings for settings in config.extensions for _ in settings.order]
    return [config.stream] * (len(tasks) - len(later)) + later


def image_data(
    config: ExperimentConfig, tasks: list[Task], engine: Engine, cache: Path, options: EvaluationOptions
) -> tuple[list[Unit], list[TestSplit], ImageReader]:
    """Training units, test splits and their reader for a stream of images; decoded once, to the cache."""
    classes = StreamClasses.of(tasks)
    form, tokens = processor_format(config.model.name, image_format(engine.module)), patches(engine.module)
    splits, tests = [], []
    for index, (task, settings) in enumerate(zip(tasks, settings_by_task(config, tasks), strict=True)):
        places = classes.places(index)
        train, test = (
            StreamImages(pixel_rows(task, split, stored_side(form), cache), places, index, tokens)
            for split in ("train", "test")
        )
        splits.append(Split(train, choose_rows(train.labels, settings.train_rows, settings.seed)))
        tests.append(image_test_split(task, test, settings.test_rows, settings.seed))
    joint = METHODS[config.method].joint

    def collator(unit: int) -> ImageCollator:
        candidates = training_candidates(classes, unit, config.vision.mask, joint)
        return ImageCollator(form, DTYPES[config.model.dtype], candidates, config.vision.crop_area, config.vision.flip)

    kind = NearestMeanReader if config.method == "ncm" else ImageReader
    return (
        build_units(config, tasks, splits, collator),
        tests,
        kind(engine, tests, options, classes, collator(0)),
    )


def build_units(
    config: ExperimentConfig, tasks: list[Task], splits: list[Split], collator_of: Callable[[int], Collator]
) -> list[Unit]:
    """What is learnt one after another: a task at a time, or all at once."""
    batch, accumulation = config.train.global_batch, config.train.accumulation
    sizes = [len(split) for split in splits]
    if METHODS[config.method].at_once:
        everything = tuple(range(len(tasks)))
        plan = BatchPlan(sum(sizes), batch, max_steps=joint_steps(config, sizes), seed=config.seed, task_index=0)
        return [Unit("all tasks", everything, tuple(splits), plan, collator_of(0), accumulation)]
    units = []
    for i, (task, split) in enumerate(zip(tasks, splits, strict=True)):
        plan = BatchPlan(len(split), batch, **steps_of(config, i, len(split)), seed=config.seed, task_index=i)
        units.append(Unit(task.name, (i,), (split,), plan, collator_of(i), accumulation))
    return units
