"""`treelora predict`: from a run's newest commit to answers, in one process and without Ray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.markup import escape

from treelora.adapters import PROMPTS, grown, load_adapter
from treelora.engine import OptimizerSpec, TorchEngine
from treelora.errors import CheckpointError, ConfigError
from treelora.evaluation.evaluator import reader_state, router_of
from treelora.local_memory import unpack_state
from treelora.memory import TaskMemory
from treelora.methods import METHODS
from treelora.models.causal import load_tokenizer
from treelora.options.tree import Inference
from treelora_platform.assemble import load_adapted_model
from treelora_platform.checkpoint import Commit, newest_commit
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.precision import settled
from treelora_platform.predict_io import answer_lines, answer_table, as_line, read_prompts
from treelora_platform.prepare import prepare_stream
from treelora_platform.quiet import quiet
from treelora_platform.run_record import load_run_config
from treelora_platform.run_tables import read_run_json, read_task_choices
from treelora_platform.serving import Learnt, Predictor
from treelora_platform.serving_images import ImagePredictor, image_prompts
from treelora_platform.serving_text import TextPredictor


@dataclass(frozen=True)
class PredictOptions:
    """How prompts are answered; None: as the run is configured."""

    inference: str | None = None
    """last, merged or routed."""
    task: str | None = None
    """Answer with this task's adapter, whatever the prompt."""
    choices: tuple[str, ...] | None = None
    """For prompts that don't bring their own."""
    router_margin: float | None = None
    max_new_tokens: int | None = None
    batch_rows: int | None = None
    base_model: str | None = None
    """Hugging Face id or folder of the base model, where it isn't found under the run's own name for it."""


def predict_file(
    run_dir: Path,
    source: str,
    options: PredictOptions,
    *,
    form: str | None = None,
    out: Path | None = None,
    table: Console | None = None,
) -> None:
    """Answer all prompts of a file.

    Args:
        run_dir: The run.
        source: See `read_prompts`, as `form`.
        options: How to answer.
        out: File for the answers as JSONL; None: standard output, unless there is a `table`.
        table: Where a table is shown in place of lines.

    Raises:
        TreeLoRAError: run, prompts or options are wrong; nothing was answered then, or (where a prompt makes no tokens
            or is refused for its length) the rounds before it were.
    """
    notes = Console(stderr=True, soft_wrap=True)

    def note(text: str) -> None:
        notes.print(f"[yellow]note:[/] {escape(text)}", highlight=False)

    images = load_run_config(run_dir).images
    if images and (form or options.choices is not None):
        raise ConfigError(f"{run_dir}: learnt images; --format and --choices are for prompts")
    prompts = image_prompts(source) if images else read_prompts(source, form)
    with quiet(), notes.status("loading the model") if notes.is_terminal else nullcontext():
        predictor = open_predictor(run_dir, options, note)
    if table and not out:
        answers = [answer for part in predictor.answers(prompts) for answer in part]
        table.print(answer_table(answers, options.task or predictor.inference))
    else:
        with answer_lines(out) as file:
            for part in predictor.answers(prompts):
                file.writelines(map(as_line, part))
                file.flush()
    if predictor.cut:
        note(f"{predictor.cut} of {len(prompts)} prompts were cut on the left, to the run's max_length")


def open_predictor(
    run_dir: Path,
    options: PredictOptions,
    note: Callable[[str], None] = lambda text: None,
    *,
    reuse: Predictor | None = None,
) -> Predictor:
    """The newest commit of a run, ready to answer.

    Args:
        run_dir: The run, finished or not.
        options: How to answer.
        note: Told what the user should know.
        reuse: A predictor of the same run with other options: its base model is taken over, and it is of no use then.

    Raises:
        ConfigError: no run is there, or it can't answer as the options ask.
        CheckpointError: no task is learnt yet, or the commit is damaged.
    """
    config = settled(_with_options(load_run_config(run_dir), options), _device())
    commit, troubles = newest_commit(run_dir)
    for trouble in troubles:
        note(f"commit passed over: {trouble}")
    if commit is None or not (commit.adapters or not METHODS[config.method].trains):
        raise CheckpointError(f"{run_dir}: no task is learnt yet; `treelora run` goes on with it")
    if lacking := [part for part in ("adapter", "evaluator") if part not in commit.parts]:
        raise CheckpointError(f"{run_dir}: the commit lacks its {', '.join(lacking)}")
    router = router_of(commit.parts["evaluator"])
    inference = _inference(run_dir, config, options, commit, bool(router.names))
    choices = (
        _task_choices(run_dir, config) if config.images or inference == "routed" or options.task is not None else {}
    )
    names = () if METHODS[config.method].joint else tuple(choices)[: len(commit.adapters)]
    if options.task is not None and options.task not in names:
        known = f"it has learnt {', '.join(names)}" if names else f"method {config.method} learns none by itself"
        raise ConfigError(f"{run_dir}: there is no task {options.task!r}; {known}")
    if inference == "routed" and tuple(router.names) != names[: len(router.names)]:
        raise CheckpointError(f"{run_dir}: the router knows {router.names}, the run's tasks are {list(names)}")
    status = read_run_json(run_dir).get("status", "FINISHED")
    if status != "FINISHED":
        note(f"the run is {status}; it has learnt {len(commit.adapters)} tasks so far")
    if config.evaluation.in_context_examples:
        note("the run was scored with solved examples before each prompt; here prompts are taken as they are")
    past = None
    if inference == "routed" and config.evaluation.router_margin and "memory" in commit.parts:
        past = TaskMemory.from_state_dict(unpack_state(commit.parts["memory"])).past()
    engine = reuse.engine if reuse else _engine(config, commit)
    shapes = {name: tensor.shape for name, tensor in engine.adapter_tensors().items()}
    states = {name: grown(load_adapter(run_dir / "adapters" / name), shapes) for name in dict.fromkeys(commit.adapters)}
    bank = [states[folder] for folder in commit.adapters]
    within_task = commit.position.step > 0 and not commit.position.trained
    last = bank[-1] if within_task else grown(commit.parts["adapter"], shapes)
    learnt = Learnt(last, bank, names, choices, router, past)
    place = names.index(options.task) if options.task is not None else None
    if config.images:
        engine.write_adapter(commit.parts["head"])
        return ImagePredictor(engine, learnt, config, inference, place, reader_state(commit.parts["evaluator"]))
    tokenizer = reuse.tokenizer if isinstance(reuse, TextPredictor) else load_tokenizer(config.model.name)
    return TextPredictor(engine, tokenizer, learnt, config.model, config.evaluation, inference, place, options.choices)


def _with_options(config: ExperimentConfig, options: PredictOptions) -> ExperimentConfig:
    given = {name: getattr(options, name) for name in ("router_margin", "max_new_tokens", "batch_rows")}
    plain = config.as_dict()
    plain["evaluation"] |= {name: value for name, value in given.items() if value is not None}
    if options.base_model is not None:
        plain["model"]["name"] = options.base_model
    return parse_config(plain, origin="predict")


def _inference(run_dir: Path, config: ExperimentConfig, options: PredictOptions, commit: Commit, router: bool) -> str:
    """The way of inference that is asked for, or that the run is meant for."""
    asked = options.inference
    if asked is not None and options.task is not None:
        raise ConfigError("--inference and --task exclude each other: a task's own adapter needs no choosing")
    if asked not in (None, *get_args(Inference)):
        raise ConfigError(f"--inference {asked!r}: use {', '.join(get_args(Inference))}")
    if options.task is not None:
        return "last"
    inference = asked or default_inference(config, router)
    if inference == "routed" and not router:
        raise ConfigError(
            f"{run_dir}: there is no router (method {config.method}, evaluation.modes "
            f"{', '.join(config.evaluation.modes)}); use --inference last or merged, or --task"
        )
    if inference == "merged" and not commit.adapters:
        raise ConfigError(f"{run_dir}: method {config.method} has no adapters to merge; use --inference last")
    return inference


def default_inference(config: ExperimentConfig, router: bool) -> str:
    """The way of inference that a run is meant for; `router`: whether it has taught one."""
    if config.method == "treelora":
        return config.treelora.inference
    return "routed" if router and METHODS[config.method].trains else "last"


def _task_choices(run_dir: Path, config: ExperimentConfig) -> dict[str, tuple[str, ...]]:
    """Names of the stream's tasks, in order, and their choices; of runs that didn't note them, from their source."""
    return read_task_choices(run_dir) or {task.name: task.choices for task in prepare_stream(config).stream}


def _engine(config: ExperimentConfig, commit: Commit) -> TorchEngine:
    ranks = [tensor.shape[0] // config.lora.rank for n, tensor in commit.parts["adapter"].items() if ".lora_A." in n]
    keys = commit.parts["adapter"].get(f"{PROMPTS}key.weight", ())
    classes = next((len(tensor) for tensor in commit.parts.get("head", {}).values()), 0)
    model = load_adapted_model(config, max(1, ranks[0] if ranks else len(keys)), classes)
    return TorchEngine(model, OptimizerSpec(), _device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
