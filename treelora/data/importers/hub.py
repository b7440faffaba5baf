"""Hugging Face data sets: by id on the hub, or a folder that ``save_to_disk`` wrote."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from treelora.data.importers.common import Options, RawRow, RawTask, choose_splits, object_rows
from treelora.data.importers.tabular import columns_of, table_task
from treelora.errors import DataError, one_line


def read(path: str, names: Sequence[str] | None, options: Options) -> Iterator[RawTask]:
    """One task for each name: a configuration of the hub's data set, or a sub-folder; one without names.

    Options: columns, splits, kind, metric, choices, revision. A column of class labels gives the choices.
    No code of a data set is run: ``datasets`` 4 and later have no loading scripts.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face data sets need `pip install 'treelora[data]'`") from error
    columns = columns_of(options)
    for name in [None] if names is None else names:
        where = path if name is None else f"{path}/{name}"
        loaded = load(datasets, path, name, options)
        if not isinstance(loaded, dict):
            raise DataError(f"{where}: one table without splits; save a DatasetDict with train and test")
        chosen = choose_splits(where, loaded, options)
        labels = _label_names(loaded[chosen["train"]], columns["answer"])
        splits = {
            split: _rows(f"{where}[{source}]", loaded[source], columns, labels) for split, source in chosen.items()
        }
        stem = path.rstrip("/").rpartition("/")[2]
        own = {**options, "choices": options.get("choices") or labels}
        yield table_task(stem if name is None else f"{stem}-{name}", where, splits, own)


def load(datasets: Any, path: str, name: str | None, options: Options) -> Any:
    """A data set or its splits; DataError where it can't be loaded."""
    where = Path(path) / name if name is not None else Path(path)
    try:
        if Path(path).exists():
            loaded = datasets.load_from_disk(str(where))
        else:
            loaded = datasets.load_dataset(path, name, revision=options.get("revision"))
        for table in loaded.values() if isinstance(loaded, dict) else ():
            table.data.validate(full=True)  # Arrow believes a damaged file's lengths, and reads beyond its end
        return loaded
    except Exception as error:  # of a damaged folder `datasets` raises whatever it stumbles over
        shown = " ".join(str(where).split())  # a name may hold any letters
        raise DataError(f"{shown}: can't be loaded as a Hugging Face data set ({one_line(error)})") from error


def _label_names(table: Any, answer: str) -> tuple[str, ...]:
    feature = table.features.get(answer)
    return tuple(getattr(feature, "names", None) or ())


def _rows(where: str, table: Any, columns: dict[str, str], labels: tuple[str, ...]) -> Iterator[RawRow]:
    answer = columns["answer"]

    def items() -> Iterator[tuple[int, Any]]:
        for index, item in enumerate(table):
            value = item.get(answer)
            if labels and isinstance(value, int):
                if not 0 <= value < len(labels):
                    yield index, RawRow(index, None, None, problem="label is outside the class names")
                    continue
                item = {**item, answer: labels[value]}
            yield index, item

    return object_rows(where, items(), columns)
