"""The axes of TreeLoRA (arXiv 2506.10355) as settings, and the presets that fill them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from treelora.options import Options

MemorySearch = Literal["tree_lcb", "flat_lcb", "full", "random", "newest"]
MemoryTree = Literal["medoid", "agglomerative", "paper"]
Bound = Literal["smooth", "literal"]
Noise = Literal["diameter", "pooled"]
Preset = Literal["treelora", "paper", "official", "plus", "protected"]
Signature = Literal["probe_b", "gradient", "query", "adapter_value"]
Penalty = Literal["prox", "none", "soft", "exact", "sign", "official"]
Search = MemorySearch | Literal["official"]
TreeKind = MemoryTree | Literal["official"]
Start = Literal["continue", "fresh", "tree_node"]
Inference = Literal["last", "merged", "routed"]

PRESETS: dict[Preset, dict[str, Any]] = {
    "treelora": {"guard": 1e5},
    "paper": {
        "signature": "query",
        "tree": "paper",
        "penalty": "exact",
        "strength": 0.5,
        "exploration": 2.0,
        "bound": "literal",
    },
    "official": {
        "signature": "adapter_value",
        "search": "official",
        "tree": "official",
        "penalty": "official",
        "strength": 0.5,
    },
    "plus": {"inference": "routed"},
    "protected": {"protect": 0.99},
}
"""What differs from the defaults; `docs/methods.md` says why."""


class TreeLoRAOptions(Options):
    """The axes of TreeLoRA (arXiv 2506.10355), all selectable; a preset fills in what isn't given."""

    preset: Preset = Field("treelora", description="Fills in the fields of this section that aren't given.")
    signature: Signature = Field(
        "probe_b", description="What a task is recognised by; `probe_b`: gradient of a zero B behind a frozen random A."
    )
    search: Search = Field("tree_lcb", description="How the arm is chosen (Eq. 2); `random` and `newest` are controls.")
    tree: TreeKind = Field("medoid", description="How the tree is built.")
    penalty: Penalty = Field("prox", description="The similarity penalty (Eq. 3).")
    strength: float = Field(0.1, ge=0, description="Lambda of Eq. 3; the paper uses 0.5 for LLMs, 0.1 for ViTs.")
    start: Start = Field("continue", description="The adapter that a task starts from.")
    inference: Inference = Field("last", description="The way of inference that the run is meant for.")
    exploration: float = Field(0.25, ge=0, description="Constant c of the confidence bound.")
    noise: Noise = Field(
        "diameter", description="Unit of c: the root's diameter, or `pooled`, the losses' standard deviation so far."
    )
    bound: Bound = Field("smooth", description="Inner nodes' bound: Coquelin and Munos', or Eq. 2 as it is printed.")
    sketch_size: int = Field(64, ge=1, description="Numbers kept of each layer's signature.")
    blocks: int = Field(1, ge=1, description="Blocks of layers that the medoid tree's levels split on in turn.")
    probe_batches: int | None = Field(
        None,
        ge=1,
        description="Global batches that the signature of a task is measured on; null: one for every 25 steps of the "
        "task, from 1 to 4, and with `guard` or `protect` a quarter of one.",
    )
    guard: float | None = Field(
        None,
        gt=0,
        description="What it costs to change what layers give for inputs that past tasks' losses depend on; null: "
        "nothing. With preset `treelora` 100,000, where one adapter goes on from task to task.",
    )
    protect: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of what its loss reads of a layer's inputs that a past task keeps to itself: later tasks "
        "learn beside it, in slices of their own and without a search; null: all tasks learn in one adapter.",
    )
    max_slices: int | None = Field(
        None,
        ge=2,
        description="With `protect`: most slices that the adapter has, whatever the number of tasks; beyond them the "
        "past's are condensed to make room for the next one; null: one a task.",
    )
    budget_mib: float | None = Field(
        None,
        gt=0,
        description="Most that past tasks may take, in MiB; beyond it the two closest are merged, or with `protect` "
        "the directions given up that tasks read least.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = given.get("preset", "treelora")
        filled = {**(PRESETS[preset] if preset in get_args(Preset) else {}), **given}
        if "guard" not in given and not _goes_on(filled):
            filled.pop("guard", None)
        return filled

    @model_validator(mode="after")
    def _axes_fit(self) -> TreeLoRAOptions:
        if self.penalty in ("soft", "sign", "exact") and self.signature not in ("gradient", "query"):
            raise ValueError(
                f"penalty {self.penalty!r} compares gradients in training; set signature to gradient or query, "
                f"not {self.signature}"
            )
        if self.start == "tree_node" and self.signature != "probe_b":
            raise ValueError(
                f"start 'tree_node' needs the signature beforehand; set signature to probe_b, not {self.signature}"
            )
        if self.blocks != 1 and self.tree != "medoid":
            raise ValueError(f"blocks {self.blocks}: only the medoid tree has blocks; set blocks to 1")
        axes = {"search": self.search, "tree": self.tree, "penalty": self.penalty}
        official = [axis for axis, value in axes.items() if value == "official"]
        if official and (len(official) < len(axes) or self.signature != "adapter_value"):
            raise ValueError(
                f"{official[0]} 'official': the released search, tree and penalty work on its own sums of values of A, "
                "so they go together; set preset to official and leave signature, search, tree and penalty out"
            )
        if self.protect is not None:
            self._protect_fits()
        if self.guard is not None and self.start != "continue":
            raise ValueError(
                f"start {self.start!r} doesn't go with guard, which holds what the last task left; set start to "
                "continue, or guard to null"
            )
        if self.protect is None and self.max_slices is not None:
            raise ValueError(f"max_slices {self.max_slices}: only protect has slices; set max_slices to null")
        if official and (self.start != "continue" or (self.guard, self.budget_mib) != (None, None)):
            raise ValueError(
                "start, guard and budget_mib: the released code goes on from the last task, guards and merges nothing"
            )
        return self

    def _protect_fits(self) -> None:
        fitting = {"signature": "probe_b", "start": "continue", "search": "tree_lcb"}
        for axis, wanted in fitting.items():
            if (value := getattr(self, axis)) != wanted:
                raise ValueError(
                    f"{axis} {value!r} doesn't go with protect, where nothing is searched; set {axis} to {wanted}, or "
                    "protect to null"
                )
        if self.guard is not None:
            raise ValueError(f"guard {self.guard:g} holds one adapter, protect has slices: set one of them to null")


def _goes_on(section: Mapping[str, Any]) -> bool:
    """Whether all tasks are learnt in one adapter, each from what the last one left: there is something to guard."""
    start, protect, search = (section.get(key) for key in ("start", "protect", "search"))
    return start in (None, "continue") and protect is None and search != "official"
