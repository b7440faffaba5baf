"""`frozen`: the pre-trained model as it is, with k solved examples before each prompt (FIX in the paper)."""

from __future__ import annotations

from dataclasses import replace

from treelora.data.schema import Example
from treelora.methods.base import Method


class Frozen(Method):
    """No training; the examples come with the prompts (`in_context`)."""

    name = "frozen"
    trains = False
    at_once = True


def in_context(rows: list[Example], solved: list[Example]) -> list[Example]:
    """Rows whose prompts begin with solved examples of their own task.

    The task of a test row is thus known, which no other inference mode is told.
    """
    shown = "".join(f"{example.prompt} {example.answer}\n\n" for example in solved)
    return [replace(row, prompt=shown + row.prompt) for row in rows]
