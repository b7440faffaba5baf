"""CIFAR-100, the binary version: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.

A record is a coarse label, a fine label and 32 x 32 pixels, all red, then all green, then all blue. The "python
version" of the same page is pickled, which can run code: it is refused.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from treelora.data.files import join, resolve
from treelora.data.images.sources.common import ImageRow, Loader, RawImages, RawSplit, array_png
from treelora.data.importers.common import Options, read_text
from treelora.data.importers.report import exists
from treelora.errors import DataError

SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE
_PIECE = 1000
_ARCHIVE = 'cifar-100-binary.tar.gz ("CIFAR-100 binary version") from https://www.cs.toronto.edu/~kriz/cifar.html'


def read(path: str, options: Options) -> RawImages:
    """train.bin, test.bin and fine_label_names.txt, here or in cifar-100-binary/; the fine labels are the classes."""
    base = path.rstrip("/")
    folders = (base, join(base, "cifar-100-binary"))
    root = next((folder for folder in folders if exists(join(folder, "train.bin"))), None)
    if root is None:
        pickled = [folder for folder in (base, join(base, "cifar-100-python")) if exists(join(folder, "meta"))]
        if pickled:
            raise DataError(
                f"{pickled[0]}: holds the python version of CIFAR-100, which is pickled and can run code; "
                f"take {_ARCHIVE}"
            )
        raise DataError(f"{base}: no train.bin; take {_ARCHIVE} and unpack it")
    names = [line.strip() for line in read_text(join(root, "fine_label_names.txt")).splitlines() if line.strip()]
    if len(set(names)) != len(names):
        raise DataError(f"{root}/fine_label_names.txt: names repeat; unpack the archive again")
    return RawImages(
        root,
        {split: _split(join(root, f"{split}.bin"), split, names) for split in ("train", "test")},
        {"classes_per_task": 10},
    )


def _split(uri: str, split: str, names: list[str]) -> RawSplit:
    rows = []
    for index, fine in enumerate(_fine_labels(uri)):
        known = fine < len(names)
        rows.append(
            ImageRow(
                f"{split}[{index}]",
                f"{split}-{index}",
                names[fine] if known else None,
                problem=None if known else "label is outside the class names",
            )
        )
    return RawSplit(rows, lambda wanted: _load(uri, wanted))


def _fine_labels(uri: str) -> Iterator[int]:
    fs, inner = resolve(uri)
    try:
        with fs.open_input_stream(inner) as source:
            while piece := source.read(_PIECE * RECORD):
                if len(piece) % RECORD:
                    raise DataError(f"{uri}: is no whole number of {RECORD}-byte records; the file is cut short")
                yield from np.frombuffer(piece, np.uint8).reshape(-1, RECORD)[:, 1].tolist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri}: can't be read ({error})") from error


def picture(record: bytes) -> npt.NDArray[np.uint8]:
    """uint8 [32, 32, 3] of a record."""
    return np.frombuffer(record, np.uint8, offset=2).reshape(3, SIDE, SIDE).transpose(1, 2, 0)


def _load(uri: str, wanted: Iterable[int]) -> Iterator[Loader]:
    fs, inner = resolve(uri)
    with fs.open_input_file(inner) as source:
        for index in wanted:
            source.seek(index * RECORD)
            record = source.read(RECORD)
            yield lambda record=record: array_png(picture(record))  # type: ignore[misc]
