"""Tasks as Parquet, token caches as Arrow, batches as tensors: data flows one way.

``tokenize`` and ``batches`` are imported from their modules where they are needed: batches need torch.
"""

from treelora.data.schema import METRICS, SPLITS, Example, SplitMeta
from treelora.data.task import Task, TaskStream, open_stream, open_task, slugify, write_split

__all__ = [
    "METRICS",
    "SPLITS",
    "Example",
    "SplitMeta",
    "Task",
    "TaskStream",
    "open_stream",
    "open_task",
    "slugify",
    "write_split",
]
