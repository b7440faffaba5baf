"""What a split file of images holds, in numbers."""

from collections import Counter
from dataclasses import dataclass

from treelora.data.images.decode import ImageProblem, image_size
from treelora.data.images.files import read_images
from treelora.errors import DataError

_SIZES_SHOWN = 3


@dataclass(frozen=True)
class ImageSummary:
    """Counts of a split. sizes: the commonest ((height, width), images); first: (id, label, bytes)."""

    images: int
    classes: int
    bytes: int
    sizes: tuple[tuple[tuple[int, int], int], ...]
    other_sizes: int
    first: tuple[tuple[str, str, int], ...]


def describe_images(path: str, rows: int = 0) -> ImageSummary:
    """Reads the whole file, and the header of every image; raises as ``read_images``, naming an odd image's row."""
    sizes: Counter[tuple[int, int]] = Counter()
    labels: set[str] = set()
    total = 0
    first: list[tuple[str, str, int]] = []
    for row in read_images(path):
        try:
            sizes[image_size(row.image)] += 1
        except ImageProblem as problem:
            raise DataError(f"{path}: row {row.id!r}: {problem.reason}; import the task again") from problem
        labels.add(row.label)
        total += len(row.image)
        if len(first) < rows:
            first.append((row.id, row.label, len(row.image)))
    common = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_SIZES_SHOWN]
    images = sizes.total()
    return ImageSummary(images, len(labels), total, tuple(common), images - sum(n for _, n in common), tuple(first))
