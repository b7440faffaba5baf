"""Tasks as Parquet, token caches as Arrow, batches as tensors: data flows one way.

``treelora.data.batches`` is imported by its own name: it needs torch, nothing here does.
"""

from treelora.data.builtin import builtin_names, write_builtin
from treelora.data.names import slugify
from treelora.data.parquet import read_split, write_split
from treelora.data.prompting import PromptStyle
from treelora.data.schema import METRICS, SPLITS, Example, SplitMeta
from treelora.data.sources import IMPORTERS, ImportReport, import_tasks
from treelora.data.task import Task, TaskStream, open_stream, open_task
from treelora.data.tokenize import TokenizedRows, tokenize_split

__all__ = [
    "IMPORTERS",
    "METRICS",
    "SPLITS",
    "Example",
    "ImportReport",
    "PromptStyle",
    "SplitMeta",
    "Task",
    "TaskStream",
    "TokenizedRows",
    "builtin_names",
    "import_tasks",
    "open_stream",
    "open_task",
    "read_split",
    "slugify",
    "tokenize_split",
    "write_builtin",
    "write_split",
]
