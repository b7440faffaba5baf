"""`sequential`: one adapter, fine-tuned on task after task. The baseline that forgets (SeqLoRA in the paper)."""

from treelora.methods.base import Method


class Sequential(Method):
    """Plain sequential LoRA fine-tuning."""

    name = "sequential"
