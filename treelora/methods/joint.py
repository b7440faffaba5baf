"""`joint`: all tasks at once, in one shuffled heap. The upper bound of what sequential methods can keep."""

from treelora.methods.base import Method


class Joint(Method):
    """Multi-task LoRA fine-tuning."""

    name = "joint"
    joint = True
    at_once = True
