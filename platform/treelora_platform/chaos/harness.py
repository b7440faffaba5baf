"""The reference run, then the same experiment under each schedule of faults, and the verdict on it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from treelora.errors import ConfigError, TreeLoRAError
from treelora_platform.chaos.account import Cost, costs, steps_again
from treelora_platform.chaos.drive import Stage, play
from treelora_platform.chaos.outline import Outline
from treelora_platform.chaos.schedule import Fault, Kind, draw
from treelora_platform.chaos.server import TrackingServer
from treelora_platform.chaos.site import LocalSite, Site
from treelora_platform.chaos.story import Story
from treelora_platform.chaos.verdict import Digest, differences, run_digest, unfinished_files
from treelora_platform.config import ExperimentConfig
from treelora_platform.prepare import check_storage, run_folder
from treelora_platform.provenance import versions
from treelora_platform.run import check_resources
from treelora_platform.run_tables import read_run_json

PATIENCE_S = 300.0
MARKER = "chaos.json"
_REFERENCE = "reference"
_OUTLINE = "reference-outline.json"


@dataclass(frozen=True)
class Plan:
    """What is tried.

    Args:
        config: The experiment.
        out: Folder for the runs and the results; belongs to this command.
        schedules, faults: How many schedules, and faults in each.
        seed: Decides what happens when.
        kinds: What may happen.
        patience_s: A driver that shows no progress for so long is taken to hang.
    """

    config: ExperimentConfig
    out: Path
    schedules: int
    faults: int
    seed: int
    kinds: tuple[Kind, ...]
    patience_s: float = PATIENCE_S


@dataclass(frozen=True)
class Outcome:
    """Of one schedule. `reasons` says why it isn't survived; `costs` belong to the story's hits, in order."""

    name: str
    story: Story
    outline: Outline
    costs: Sequence[Cost] = ()
    reasons: Sequence[str] = ()
    drawn: Sequence[Fault] = field(default=())

    @property
    def survived(self) -> bool:
        """Whether the run is the reference to the last bit, came there by itself, and left nothing running."""
        return not self.reasons

    @property
    def steps_again(self) -> int:
        """Steps that were made again."""
        return steps_again(self.story.events)


def run_chaos(plan: Plan, console: Console, site: Site | None = None, fresh: bool = False) -> list[Outcome]:
    """Try all schedules of a plan; results are in its folder after each.

    Args:
        plan: What is tried.
        console: Where it is told.
        site: Where the drivers' Ray is; None: each starts its own.
        fresh: Make the reference run again although it is complete.

    Raises:
        TreeLoRAError: the plan makes no sense, or the run fails without any fault.
    """
    from treelora_platform.chaos.results import write_results

    _check(plan)
    _claim(plan)
    mark = f"server-{time.time_ns()}"
    server = TrackingServer(plan.out, mark) if "mlflow" in plan.kinds else None
    try:
        if server:
            with console.status("starting an MLflow server"):
                server.begin()
                server.wait()
        address = server.address if server else f"sqlite:///{(plan.out.resolve() / 'mlflow.db').as_posix()}"
        trial = _Trial(plan, console, site or LocalSite(), server, address)
        outline, expected = trial.reference(fresh)
        outcomes = []
        for number, faults in enumerate(draw(plan.seed, plan.schedules, plan.faults, plan.kinds, outline), 1):
            console.print(f"[bold]schedule {number} of {plan.schedules}[/]")
            outcomes.append(trial.schedule(f"schedule-{number}", faults, outline, expected))
            write_results(plan.out / MARKER, plan, outcomes)
        return outcomes
    finally:
        if server:
            server.kill()


@dataclass
class _Trial:
    plan: Plan
    console: Console
    site: Site
    server: TrackingServer | None
    address: str

    def reference(self, fresh: bool) -> tuple[Outline, Digest]:
        """Outline and digest of the run without faults, which is made if it isn't there."""
        config = self._placed(_REFERENCE)
        run_dir, kept = run_folder(config), self.plan.out / _OUTLINE
        outline = None if fresh else _kept_outline(kept, run_dir, config)
        if outline is None:
            self.console.print("the reference run, without faults")
            story = self._play(_REFERENCE, (), None)
            if story.ended or story.gave_up:
                raise TreeLoRAError(
                    f"the reference run failed without any fault: {'; '.join([*story.gave_up, story.ended])} "
                    f"(log: {self._log(_REFERENCE)})"
                )
            begun, ended = story.commands[0].begun, story.commands[-1].ended
            outline = Outline.of(story.events, config.checkpoint.every_steps, begun, ended)
            outline.save(kept)
            for left in [*story.left_behind, *unfinished_files(run_dir)]:
                self.console.print(f"  [yellow]left behind without any fault:[/] {left}", highlight=False)
            self.console.print(f"  done in {story.seconds:.0f} s")
        return outline, run_digest(run_dir, self.address)

    def schedule(self, name: str, faults: Sequence[Fault], outline: Outline, expected: Digest) -> Outcome:
        """The run under faults, and what has become of it."""
        run_dir = run_folder(self._placed(name))
        story = self._play(name, faults, outline)
        reasons = [story.ended] if story.ended else []
        reasons += [f"the driver gave up ({words})" for words in story.gave_up]
        reasons += [f"left behind: {left}" for left in story.left_behind]
        if not story.ended:
            try:
                reasons += differences(expected, run_digest(run_dir, self.address))
                reasons += [f"left behind: {path}" for path in unfinished_files(run_dir)]
            except TreeLoRAError as error:
                reasons.append(str(error))
        outcome = Outcome(name, story, outline, costs(story.hits, story.events, outline), reasons, faults)
        verdict = "[green]survived[/]" if outcome.survived else "[bold red]not survived[/]"
        self.console.print(f"  {verdict} after {story.seconds:.0f} s, {outcome.steps_again} steps made again")
        for reason in reasons:
            self.console.print(f"    {reason}", markup=False, highlight=False)
        return outcome

    def _play(self, name: str, faults: Sequence[Fault], outline: Outline | None) -> Story:
        config, log = self._placed(name), self._log(name)
        shutil.rmtree(config.output_dir, ignore_errors=True)
        log.unlink(missing_ok=True)
        path = self.plan.out / f"{name}.yaml"
        path.write_text(config.as_yaml(), encoding="utf-8")
        stage = Stage(path, run_folder(config), log, self.site, self.server, self.plan.patience_s, self._say)
        return play(stage, faults, outline)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    def _log(self, name: str) -> Path:
        return self.plan.out / f"{name}.log"

    def _placed(self, name: str) -> ExperimentConfig:
        """The experiment in a folder and an MLflow experiment of its own, ready for as many failures as faults.

        It keeps its name: that is part of the memory's state.
        """
        config = self.plan.config
        failures = max(config.cluster.max_failures, self.plan.faults)
        tracking = {"uri": self.address, "experiment": f"{config.tracking.experiment}-{name}"}
        return config.model_copy(
            update={
                "output_dir": str(self.plan.out.resolve() / name),
                "tracking": config.tracking.model_copy(update=tracking),
                "cluster": config.cluster.model_copy(update={"max_failures": failures}),
            }
        )


def _check(plan: Plan) -> None:
    config = plan.config
    if "tree-actor" in plan.kinds and config.method != "treelora":
        raise ConfigError(f"--kinds tree-actor: method {config.method} has no tree actor; leave this kind out")
    stall = config.cluster.stall_seconds
    if "stall" in plan.kinds and (stall is None or 2 * stall > plan.patience_s):
        raise ConfigError(
            f"--kinds stall: a frozen worker would be noticed after cluster.stall_seconds {stall}, a run is given up "
            f"after --patience {plan.patience_s:g}; set cluster.stall_seconds to 20, say"
        )
    check_storage(config.model_copy(update={"output_dir": str(plan.out)}))
    check_resources(config)


def _claim(plan: Plan) -> None:
    """Make the folder ours, where it isn't somebody else's: runs in it are deleted."""
    plan.out.mkdir(parents=True, exist_ok=True)
    marker = plan.out / MARKER
    if not marker.exists():
        if any(plan.out.iterdir()):
            raise ConfigError(f"--out {plan.out}: is not empty and no folder of `treelora chaos`; give another")
        marker.write_text("{}", encoding="utf-8")


def _kept_outline(kept: Path, run_dir: Path, config: ExperimentConfig) -> Outline | None:
    """Outline of a reference that is complete and made with this configuration and these versions."""
    record = read_run_json(run_dir)
    same = (record.get("status"), record.get("config_hash")) == ("FINISHED", config.digest())
    return Outline.load(kept) if same and record.get("versions") == versions() else None
