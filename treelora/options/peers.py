"""Settings of the methods that TreeLoRA is compared with. The formulas are in the methods' own files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from treelora.options import Options


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
