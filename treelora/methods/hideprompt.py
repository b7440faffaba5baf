"""`hideprompt`: HiDe-Prompt (Wang et al., NeurIPS 2023, arXiv 2310.07234): HiDe-LoRA with prefixes in place of LoRA.

Each task has a prompt of its own: keys and values before those of the first layers' attention. Task identity,
alignment of the head and the contrastive term are as in `hidelora`. The authors train a task's prompt through its
mixture with those before it, (1 - a) e_t + a mean of p_1 .. p_(t-1), with e_t starting as its predecessor ended. Here
the mixture itself is what is trained, from where theirs starts: under Adam, which doesn't see a gradient's scale, that
differs by a factor 1 - a of the learning rate. Defaults are those of their code for CIFAR-100
(https://github.com/thu-ml/HiDe-Prompt): 20 keys and values in each of the layers 0 to 4, a = 0.01, lambda = 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from treelora.adapters import AdapterState
from treelora.engine import Engine, read_adapter
from treelora.methods.base import TaskContext
from treelora.methods.hidelora import drawn
from treelora.methods.prompting import Prompting
from treelora.methods.spreading import Spreading
from treelora.models.prompted import PromptSpec
from treelora.options.peers import HiDePromptOptions


class HiDePrompt(Spreading, Prompting):
    """HiDe-Prompt."""

    name = "hideprompt"

    def __init__(self, options: HiDePromptOptions | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.options = options or HiDePromptOptions()
        self.spread = self.options.spread

    @staticmethod
    def prompts(options: HiDePromptOptions, tasks: int) -> PromptSpec:
        """See `Prompting`."""
        return PromptSpec(size=1, length=options.length, layers=options.layers, keyed=False)

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        super().begin_task(task, engine, bank)
        if bank:
            engine.write_adapter(drawn(read_adapter(engine), bank, self.options.ensemble))
