"""The layout of O-LoRA's benchmark (Wang et al., EMNLP Findings 2023, arXiv 2310.14152).

``<root>/<group>/<task>/{labels,train,dev,test}.json``: labels.json lists the choices, the others are lists of
{"sentence", "label"}. A task answers to "SST-2" and to "SC/SST-2".
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from treelora.data.files import join
from treelora.data.importers.common import (
    Options,
    RawRow,
    RawTask,
    find_tasks,
    json_rows,
    read_json_list,
    split_files,
)
from treelora.errors import ConfigError, DataError

# Our own wording: the paper's instructions are longer, and the choices must be named somewhere.
TEMPLATE = "{text}\nOptions: {choices}\nAnswer:"
_COLUMNS = {"prompt": "sentence", "answer": "label"}


def read(path: str, names: Sequence[str] | None, options: Options) -> Iterator[RawTask]:
    """One choice task for each folder; ``options["template"]`` may use {text} and {choices}."""
    template = options.get("template", TEMPLATE)
    if "{text}" not in template:
        raise ConfigError(f"options.template {template!r} needs {{text}}")
    for name, folder in find_tasks(path, "labels.json", names).items():
        labels = read_json_list(join(folder, "labels.json"))
        if len(labels) < 2 or any(not isinstance(label, str) or not label.strip() for label in labels):
            raise DataError(f"{folder}/labels.json: expected a list of two or more texts, found {labels!r}")
        choices = tuple(label.strip() for label in labels)
        yield RawTask(
            name=name,
            where=folder,
            kind="choice",
            choices=choices,
            metric="accuracy",
            splits={
                split: _worded(json_rows(file, _COLUMNS), template, choices)
                for split, file in split_files(folder, ".json", options).items()
            },
        )


def _worded(rows: Iterator[RawRow], template: str, choices: Sequence[str]) -> Iterator[RawRow]:
    around = template.replace("{choices}", ", ".join(choices))
    for row in rows:
        # A blank sentence must stay blank, or the words around it would make it look usable.
        if isinstance(row.prompt, str) and row.prompt.strip():
            yield replace(row, prompt=around.replace("{text}", row.prompt.strip()))
        else:
            yield row
