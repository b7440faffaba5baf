"""`frozen`: the pre-trained model as it is, with k solved examples before each prompt (FIX in the paper)."""

from treelora.methods.base import Method


class Frozen(Method):
    """No training; in-context examples come with the evaluation."""

    name = "frozen"
    trains = False
