"""Decoded splits: made once, in threads, cached by content hash, memory-mapped by every worker.

A cache file holds record batches of ``_batch_rows`` images each. Shapes: H rows and W columns of pixels, n images.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from treelora.data.images.decode import MAX_PIXELS, ImageProblem, decode, image_size
from treelora.data.images.files import ImageExample, read_images
from treelora.data.images.threads import ordered_map
from treelora.data.parquet import read_meta
from treelora.data.sealed import read_sealed, write_sealed
from treelora.data.task import Task
from treelora.errors import ConfigError, DataError

log = logging.getLogger(__name__)

CACHE_FORMAT = 2
Pixels = npt.NDArray[np.uint8]
_BATCH_BYTES = 8 << 20


class ImageRows:
    """A memory-mapped split of decoded images, with the surface of ``TokenizedRows`` that training uses.

    labels: int32 [n], index into the task's choices. shape: (H, W), the same for all images. lengths and
    answer_lengths: int64 [n] of ones, an image being one item with one answer. key: the file's name.
    """

    truncated = 0

    def __init__(self, path: Path, batches: list[pa.RecordBatch], info: dict[str, Any]) -> None:
        self.path = path
        self.key = path.stem
        self.shape: tuple[int, int] = (info["height"], info["width"])
        self.skipped: dict[str, int] = {}
        self._batch_rows: int = info["batch_rows"]
        self._ids = [batch.column("id") for batch in batches]
        self._pixels = [
            np.frombuffer(batch.column("pixels").buffers()[1], np.uint8).reshape(batch.num_rows, *self.shape, 3)
            for batch in batches
        ]
        self.labels: npt.NDArray[np.int32] = np.concatenate([np.asarray(batch.column("label")) for batch in batches])
        self.labels.setflags(write=False)
        self.lengths: npt.NDArray[np.int64] = np.ones(len(self.labels), np.int64)
        self.answer_lengths = self.lengths

    @classmethod
    def open(cls, path: str | Path) -> "ImageRows":
        """Map a cache file; DataError where its checksum or its schema is not what was written."""
        path = Path(path)
        batches, info = read_sealed(path)
        if info.get("format") != CACHE_FORMAT or any(
            batch.schema.remove_metadata() != _schema(info["height"], info["width"]) for batch in batches
        ):
            raise DataError(f"{path}: not a cache file of this version; delete it")
        return cls(path, batches, info)

    def __len__(self) -> int:
        return len(self.labels)

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return divmod(i, self._batch_rows)

    def row_id(self, i: int) -> str:
        """The example's id."""
        batch, row = self._place(i)
        return str(self._ids[batch][row].as_py())

    def item(self, i: int) -> Pixels:
        """uint8 [H, W, 3], a read-only view into the file."""
        batch, row = self._place(i)
        return self._pixels[batch][row]

    def items(self, indices: Iterable[int]) -> Pixels:
        """uint8 [B, H, W, 3], a copy of some rows, as a batch takes them."""
        return np.stack([self.item(int(i)) for i in indices])

    def label(self, i: int) -> int:
        """Index of the image's class among the choices."""
        return int(self.labels[i])


def pixel_rows(task: Task, split: str, side: int, cache_dir: str | Path) -> ImageRows:
    """The decoded images of a split, from the cache where it has them.

    Where all images have one size with both sides at most ``side``, they are kept as they are: what a model
    needs beyond that is made on its device. Else the shorter side of each is resized to ``side`` (bicubic) and
    the centre square is cut out. Raises DataError naming a row that can't be decoded, ConfigError for a
    ``side`` below 1.
    """
    if side < 1:
        raise ConfigError(f"image side is {side}; use at least 1 pixel")
    if task.kind != "image":
        raise DataError(f"task {task.name!r} is of kind {task.kind!r}; only images have pixels")
    key_parts = [CACHE_FORMAT, task.fingerprint(split), side]
    path = Path(cache_dir) / f"{hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()}.pixels.arrow"
    rows = _cached(path)
    if rows is None:
        _make(path, task, split, side)
        rows = ImageRows.open(path)
    return rows


def _cached(path: Path) -> ImageRows | None:
    """The cache file's images; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        return ImageRows.open(path)
    except DataError as error:
        log.warning("%s; decoding again", error)
        return None


def _schema(height: int, width: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("pixels", pa.binary(height * width * 3), nullable=False),
        ]
    )


def _make(path: Path, task: Task, split: str, side: int) -> None:
    where = task.path(split)
    common = _common_size(where, side)
    height, width = common or (side, side)
    batch_rows = max(_BATCH_BYTES // (height * width * 3), 1)
    info = {
        "format": CACHE_FORMAT,
        "task": task.name,
        "split": split,
        "rows": read_meta(where)[1],
        "height": height,
        "width": width,
        "batch_rows": batch_rows,
    }
    schema = _schema(height, width)
    places = {label: place for place, label in enumerate(task.choices)}

    def pixels(row: ImageExample) -> tuple[str, int, bytes]:
        return row.id, places[row.label], _pixels(where, row, side if common is None else None).tobytes()

    def batches() -> Iterator[pa.RecordBatch]:
        made = ordered_map(pixels, read_images(where))
        while piece := list(islice(made, batch_rows)):
            columns = [pa.array(column, f.type) for column, f in zip(zip(*piece, strict=True), schema, strict=True)]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    write_sealed(path, schema, batches(), info)


def _common_size(where: str, side: int) -> tuple[int, int] | None:
    """(H, W) that all images have, at most ``side`` each; None as soon as one differs."""
    sizes: set[tuple[int, int]] = set()
    for row in read_images(where):
        sizes.add(_judged(where, row, lambda: image_size(row.image)))  # noqa: B023 - called at once
        if len(sizes) > 1 or max(max(sizes)) > side:
            return None
    return sizes.pop()


def _pixels(where: str, row: ImageExample, side: int | None) -> Pixels:
    """uint8 [H, W, 3] of one image; fitted to a square where a side is given."""
    from PIL.Image import Image

    image: Image = _judged(where, row, lambda: decode(row.image))
    return np.asarray(image if side is None else fitted(image, side))


def _judged(where: str, row: ImageExample, work: Any) -> Any:
    try:
        return work()
    except ImageProblem as problem:
        raise DataError(f"{where}: row {row.id!r}: {problem.reason}; import the task again") from problem


def fitted(image: Any, side: int) -> Any:
    """A PIL image with its shorter side resized to ``side`` (bicubic), cut to the centre square."""
    from PIL.Image import Resampling

    width, height = image.size
    short = min(width, height)
    wide, high = round(width * side / short), round(height * side / short)
    if wide * high > MAX_PIXELS:
        # A thread-like image would grow beyond any memory: all but its middle is cut off first.
        left, top = (width - short) // 2, (height - short) // 2
        return image.crop((left, top, left + short, top + short)).resize((side, side), Resampling.BICUBIC)
    left, top = (wide - side) // 2, (high - side) // 2
    resized = image.resize((wide, high), Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))
