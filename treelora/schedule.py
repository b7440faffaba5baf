"""The learning rate of a task's steps."""

import math


def learning_rate(step: int, steps: int, peak: float, warmup: float, floor: float) -> float:
    """Linear warm-up, then half a cosine (Loshchilov and Hutter, 2017, arXiv 1608.03983).

    Args:
        step: From 1 to `steps`.
        steps: Steps of the task.
        peak: Largest learning rate.
        warmup: Share of the steps with rising rate.
        floor: Rate at the last step, as a share of `peak`.
    """
    rising = min(int(warmup * steps), steps - 1)
    if step <= rising:
        return peak * step / (rising + 1)
    progress = (step - rising) / max(1, steps - rising)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
