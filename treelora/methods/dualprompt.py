"""`dualprompt`: DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799): one prompt for all tasks, and one for each.

The G-prompt stands in the first layers and is trained throughout; in the next ones stands the task's own E-prompt. Both
are prefixes: with p = [p_k; p_v], attention sees the keys [p_k; K] and values [p_v; V], and the head reads the class
token. While a task is learnt its images get its E-prompt, and its key is drawn to their queries (class tokens of the
frozen model); at test the E-prompt is that of the nearest key by cosine, among the tasks learnt so far:

    loss = cross-entropy + lambda * (1 - cos(q(x), k_t))

Defaults are those of the authors' code for CIFAR-100 (https://github.com/google-research/l2p): layers 0 and 1 for G,
2 to 4 for E, 5 keys and values each, lambda = 1, an E-prompt that starts as its predecessor ended.

As in their code, and unlike the paper's formula, prefixes stand behind the projections to keys and values. Where this
leaves them: an image chooses for itself at test time (their code lets a batch vote), and prompts and keys start within
1/sqrt(D) of zero (theirs: 0 to 0.01). A task's prompt and key are zero until it begins, so the tensors alone say which
tasks there were; weight decay is refused, for it would shrink earlier ones. `merged` is refused, as for `l2p`.
"""

from __future__ import annotations

from collections.abc import Sequence

from treelora.adapters import PROMPTS, AdapterState
from treelora.engine import Engine
from treelora.methods.base import TaskContext
from treelora.methods.prompting import Prompting
from treelora.models.prompted import PromptSpec, fresh_prompts
from treelora.options.peers import DualPromptOptions

KEY = f"{PROMPTS}key.weight"


class DualPrompt(Prompting):
    """DualPrompt."""

    name = "dualprompt"
    accumulates = True

    def __init__(self, options: DualPromptOptions | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.options = options or DualPromptOptions()
        self.pull = self.options.pull

    @staticmethod
    def prompts(options: DualPromptOptions, tasks: int) -> PromptSpec:
        """See `Prompting`."""
        return PromptSpec(
            size=tasks,
            length=options.length,
            layers=options.layers,
            staged=True,
            general_length=options.general_length,
            general_layers=options.general_layers,
        )

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`: the task's prompt and key come."""
        started: AdapterState = {}
        for name, tensor in engine.adapter_tensors().items():
            if name.startswith(f"{PROMPTS}general"):
                continue
            started[name] = tensor.detach().float().cpu().clone()
            goes_on = task.index > 0 and self.options.start == "previous" and name != KEY
            started[name][task.index] = (
                started[name][task.index - 1]
                if goes_on
                else fresh_prompts(name.removesuffix(".weight"), (1, *tensor.shape[1:]), self.seed, task.index)[0]
            )
        engine.write_adapter(started)
