"""Which adapter answers a routed prompt: that of one task, or, where the router can't tell two apart, an average.

The average is over the tasks below the smallest node of the method's tree that holds both: a family that the prompt
belongs to is known better than the member. Methods without a tree average the two.

Shapes: n prompts, N tasks, arms as in `treelora.memory_records`.
"""

from __future__ import annotations

from collections.abc import Sequence

from treelora.adapters import AdapterState, mean_adapter
from treelora.evaluation.router import Routes
from treelora.memory_records import Groups
from treelora.tree import SignatureTree

AVERAGE = "node "
"""What `adapter_key` gives the average of several adapters begins with this."""


def answering_tasks(
    routes: Routes, margin: float, tree: SignatureTree | None = None, groups: Groups | None = None
) -> list[tuple[int, ...]]:
    """For each of n prompts the tasks, ascending, whose mean adapter answers: one where the margin is large enough.

    Args:
        routes: What the router takes the prompts for.
        margin: Log-likelihood margin below which two tasks count as not told apart; 0: never.
        tree: Over arms; None: the two likeliest tasks themselves are averaged.
        groups: The tasks behind each arm; None: arm k is task k.
    """
    rows = zip(routes.best_n.tolist(), routes.second_n.tolist(), (routes.margin_n < margin).tolist(), strict=True)
    known: dict[tuple[int, int], tuple[int, ...]] = {}
    chosen: list[tuple[int, ...]] = []
    for best, second, unsure in rows:
        if not unsure:
            chosen.append((best,))
            continue
        pair = (min(best, second), max(best, second))
        if pair not in known:
            known[pair] = pair if tree is None else common_tasks(tree, groups, *pair)
        chosen.append(known[pair])
    return chosen


def common_tasks(tree: SignatureTree, groups: Groups | None, one: int, other: int) -> tuple[int, ...]:
    """The tasks, ascending, below the lowest node that has both tasks below it; of one arm: the arm's tasks."""
    groups = groups or tuple((task,) for task in range(tree.tasks))
    arm_of = {task: arm for arm, group in enumerate(groups) for task in group}
    node, target = int(tree.leaf[arm_of[one]]), int(tree.leaf[arm_of[other]])
    while not node <= target < node + 2 * int(tree.size[node]) - 1:
        node = int(tree.parent[node])
    return tuple(sorted(task for arm in tree.tasks_below(node) for task in groups[arm]))


def adapter_of(bank: Sequence[AdapterState], tasks: Sequence[int]) -> AdapterState:
    """The mean of the tasks' adapters, each task counting once; the bank's own object where they share one."""
    states = {id(bank[task]): bank[task] for task in tasks}
    if len(states) == 1:
        return bank[tasks[0]]
    weights = [sum(bank[task] is state for task in tasks) for state in states.values()]
    return mean_adapter(list(states.values()), weights)


def adapter_key(bank: Sequence[AdapterState], tasks: Sequence[int]) -> str:
    """A name for what `adapter_of` gives, by the tasks that share each adapter: `task 0+1`, or `node 0+1|2`."""
    sharing = dict.fromkeys(tuple(k for k, other in enumerate(bank) if other is bank[task]) for task in tasks)
    return ("task " if len(sharing) == 1 else AVERAGE) + "|".join("+".join(map(str, group)) for group in sharing)
