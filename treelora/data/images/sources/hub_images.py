"""Hugging Face data sets of images: by id on the hub, or a folder that ``save_to_disk`` wrote."""

from typing import Any

from treelora.data.images.sources.common import ImageRow, RawImages, RawSplit, loaders
from treelora.data.images.sources.tables import label_text
from treelora.data.importers.common import Options, choose_splits, read_bytes
from treelora.data.importers.hub import load
from treelora.errors import DataError


def read(path: str, options: Options) -> RawImages:
    """Options: image_column ("image"), label_column ("label"), splits, config, revision.

    Encoded bytes are taken as they are. No code of a data set is run: ``datasets`` 4 and later have no loading
    scripts.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face data sets need `pip install 'treelora[data]'`") from error
    image = options.get("image_column", "image")
    label = options.get("label_column", "label")
    loaded = load(datasets, path, options.get("config"), options)
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: one table without splits; save a DatasetDict with train and test")
    chosen = choose_splits(path, loaded, options)
    splits = {
        split: _split(datasets, f"{path}[{source}]", split, loaded[source], image, label)
        for split, source in chosen.items()
    }
    return RawImages(path, splits, {})


def _split(datasets: Any, where: str, split: str, table: Any, image: str, label: str) -> RawSplit:
    for role, column in (("image", image), ("label", label)):
        if column not in table.features:
            raise DataError(
                f"{where}: no column '{column}' for the {role}; found {sorted(table.features)}. Name it with "
                f"options.{role}_column"
            )
    kind = table.features[image]
    if isinstance(kind, datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    elif getattr(_of_bytes(kind), "dtype", None) not in ("binary", "large_binary"):
        raise DataError(f"{where}: column '{image}' is {kind}, expected images or their encoded bytes")
    names = tuple(getattr(table.features[label], "names", None) or ())
    rows = []
    for index, value in enumerate(table.select_columns([label])[label]):
        text, problem = label_text(value, names)
        rows.append(ImageRow(f"{split}[{index}]", f"{split}-{index}", text, problem=problem))
    images = table.select_columns([image])
    return RawSplit(rows, lambda wanted: loaders(wanted, lambda index: _bytes(images[index][image])))


def _of_bytes(kind: Any) -> Any:
    """The feature that holds the bytes: the column's own, or that in a struct of bytes and path."""
    return kind.get("bytes") if isinstance(kind, dict) else kind


def _bytes(cell: Any) -> bytes:
    """Encoded bytes of a cell; b"" where there are none."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            return read_bytes(str(cell["path"]))
        cell = cell.get("bytes")
    return bytes(cell or b"")
