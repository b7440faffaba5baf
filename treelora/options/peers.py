"""Settings of the methods that TreeLoRA is compared with. The formulas are in the methods' own files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from treelora.options import Options

Layers = tuple[Annotated[int, Field(ge=0)], ...]


class OLoRAOptions(Options):
    """Settings of O-LoRA."""

    strength: float = Field(0.5, ge=0, description="Lambda_1, the weight of the overlap with past tasks' subspaces.")


class InfLoRAOptions(Options):
    """Settings of InfLoRA; the authors' for CIFAR-100."""

    energy: float = Field(0.95, gt=0, le=1, description="Share of its inputs' energy that the first task protects.")
    final_energy: float = Field(1.0, gt=0, le=1, description="What that share rises to, evenly over the tasks.")
    batches: int = Field(8, ge=1, description="Global batches that inputs are measured on, before and after a task.")


class SDLoRAOptions(Options):
    """Settings of SD-LoRA."""

    magnitude_rate: float = Field(1.0, ge=0, description="Learning rate of the magnitudes, in units of the weights'.")


class EWCOptions(Options):
    """Online EWC (arXiv 1805.06370)."""

    strength: float = Field(400.0, ge=0, description="Lambda; 400 as in TreeLoRA's code, to be tuned for each stream.")
    gamma: float = Field(0.95, ge=0, le=1, description="What is left of the Fisher information when a task is added.")
    fisher_rows: int = Field(128, ge=1, description="Most training rows of a task that its Fisher information is of.")


class AGEMOptions(Options):
    """A-GEM (arXiv 1812.00420)."""

    rows_per_task: int = Field(64, ge=1, description="Training rows kept of every task.")
    batch_rows: int = Field(8, ge=1, description="Kept rows, over all workers, that a step's reference gradient is of.")
    micro_rows: int = Field(8, ge=1, description="Most kept rows of one forward pass of one worker.")


class GEMOptions(Options):
    """GEM (arXiv 1706.08840)."""

    rows_per_task: int = Field(8, ge=1, description="Training rows kept of every task, all of them used at every step.")
    margin: float = Field(0.5, ge=0, description="Least dual weight of a past task where any objects; the paper's 0.5.")
    micro_rows: int = Field(8, ge=1, description="Most kept rows of one forward pass of one worker.")


class OGDOptions(Options):
    """OGD (arXiv 1910.07104)."""

    rows_per_task: int = Field(
        16, ge=1, description="Training rows of a task whose gradients are kept; the paper's 200 take as many adapters."
    )
    basis_rows: int = Field(128, ge=1, description="Most directions that are kept, each as large as the adapter.")
    project_step: bool = Field(True, description="Project the step that AdamW makes, not only the gradient.")


class ReplayOptions(Options):
    """Experience replay; 1 % of the rows is the memory that continual learning of language models is compared at."""

    share: float = Field(0.01, gt=0, le=1, description="Share of a task's training rows that is kept, at least one.")
    fraction: float = Field(0.25, ge=0, lt=1, description="Share of a step's rows that is replayed, one row at least.")
    weight: float = Field(1.0, ge=0, description="Weight of a replayed row's tokens against one of the task's own.")


class LwFOptions(Options):
    """LwF (arXiv 1606.09282)."""

    strength: float = Field(1.0, ge=0, description="Lambda_o, the weight of the old outputs; the paper's 1.")
    temperature: float = Field(2.0, gt=0, description="T, which the logits are divided by; the paper's 2.")


class TaSLOptions(Options):
    """TaSL (arXiv 2408.05200)."""

    unit: Literal["matrix", "module"] = Field("matrix", description="A skill unit: A or B alone, or a module's both.")
    smoothing: float = Field(0.85, ge=0, lt=1, description="Alpha, of sensitivity and uncertainty.")
    past_importance: float = Field(0.7, ge=0, le=1, description="Beta: weight of earlier tasks' importance.")
    past_weights: float = Field(0.7, ge=0, le=1, description="Gamma: weight of the old values of a unit that all need.")
    top: float = Field(0.2, gt=0, lt=1, description="Share of units that count as important.")


class HiDeLoRAOptions(Options):
    """HiDe-LoRA (arXiv 2407.05229)."""

    start: Literal["previous", "fresh"] = Field(
        "previous", description="A task's adapter starts as its predecessor ended, as in the authors' code, or anew."
    )
    ensemble: float = Field(
        0.1, ge=0, lt=1, description="Share of the past adapters' mean in a task's adapter; the authors' 0.1."
    )
    spread: float = Field(
        0.001, ge=0, description="Lambda, the weight of the term that spreads an image's features; the authors' 0.001."
    )


class HiDePromptOptions(Options):
    """HiDe-Prompt (arXiv 2310.07234); the authors' code for CIFAR-100."""

    length: int = Field(20, ge=1, description="Keys and values of a prompt in each of its layers.")
    layers: Layers = Field((0, 1, 2, 3, 4), min_length=1, description="Layers with a prompt, from 0.")
    ensemble: float = Field(0.01, ge=0, lt=1, description="Share of the past prompts' mean in a task's prompt.")
    spread: float = Field(0.1, ge=0, description="Lambda, the weight of the term that spreads an image's features.")


class L2POptions(Options):
    """L2P (arXiv 2112.08654); the authors' code for CIFAR-100."""

    size: int = Field(10, ge=1, description="M, prompts in the pool.")
    top: int = Field(4, ge=1, description="N, prompts that an image gets.")
    length: int = Field(10, ge=1, description="Tokens of a prompt.")
    pull: float = Field(1.0, ge=0, description="Lambda, the weight of the keys' distance from their queries.")

    @model_validator(mode="after")
    def _enough(self) -> L2POptions:
        if self.top > self.size:
            raise ValueError(f"top {self.top} is more than the {self.size} prompts of the pool; lower it")
        return self


class DualPromptOptions(Options):
    """DualPrompt (arXiv 2204.04799); the authors' code for CIFAR-100."""

    general_length: int = Field(5, ge=1, description="Keys and values of the G-prompt in each of its layers.")
    general_layers: Layers = Field((0, 1), description="Layers of the G-prompt, from 0.")
    length: int = Field(5, ge=1, description="Keys and values of a task's E-prompt in each of its layers.")
    layers: Layers = Field((2, 3, 4), min_length=1, description="Layers of the E-prompts.")
    pull: float = Field(1.0, ge=0, description="Lambda, the weight of a key's distance from its task's queries.")
    start: Literal["previous", "fresh"] = Field(
        "previous", description="An E-prompt starts as its predecessor ended, as in the authors' code, or anew."
    )

    @model_validator(mode="after")
    def _apart(self) -> DualPromptOptions:
        if both := sorted(set(self.layers) & set(self.general_layers)):
            raise ValueError(f"layer {both[0]} is in layers and in general_layers; take it out of one")
        return self
