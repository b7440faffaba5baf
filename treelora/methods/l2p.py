"""`l2p`: Learning to Prompt (Wang et al., CVPR 2022, arXiv 2112.08654): a pool of prompts, chosen by their keys.

Each of M prompts has a key. An image's query q(x) is the class token that the frozen model gives; the N prompts whose
keys have the largest cosine with it are put before the tokens, and the head reads the mean of the outputs at the
prompts' places. Trained are these prompts, the head, and the chosen keys, which are drawn to the query:

    loss = cross-entropy + lambda * sum over the chosen of (1 - cos(q(x), k))

All tasks share the pool; nothing tells the task at test time. Defaults are those of the authors' code for CIFAR-100
(https://github.com/google-research/l2p): M = 10, N = 4, 10 tokens, lambda = 1.

Where this leaves them: each image gets the prompts that it chooses, in training too, as the paper has it (their code
lets a batch vote on one choice for all); prompts and keys start within 1/sqrt(D) of zero (theirs: 0 to 0.01). The
paper's optional penalty on prompts that are chosen often isn't here. There is no mean of pools, so inference `merged`
is refused; `routed` answers with the pool as the inferred task left it.
"""

from __future__ import annotations

from treelora.methods.prompting import Prompting
from treelora.models.prompted import PromptSpec
from treelora.options.peers import L2POptions


class L2P(Prompting):
    """L2P."""

    name = "l2p"

    def __init__(self, options: L2POptions | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.pull = (options or L2POptions()).pull

    @staticmethod
    def prompts(options: L2POptions, tasks: int) -> PromptSpec:
        """See `Prompting`."""
        return PromptSpec(options.size, options.length, top=options.top)
