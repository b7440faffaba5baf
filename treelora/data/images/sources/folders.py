"""Folders of image files, one folder a class; and ImageNet-R, which is one.

ImageNet-R: Hendrycks et al., ICCV 2021, arXiv 2006.16241, https://github.com/hendrycks/imagenet-r.
"""

import re
from collections.abc import Mapping, Sequence

from treelora.data.files import join
from treelora.data.images.sources.common import (
    ImageRow,
    RawImages,
    RawSplit,
    loaders,
    natural,
    split_by_share,
    test_share,
)
from treelora.data.images.sources.labels import folder_label, read_labels
from treelora.data.importers.common import SPLIT_NAMES, Options, choose_splits, list_files, read_bytes
from treelora.data.schema import SPLITS
from treelora.errors import ConfigError, DataError

LAYOUTS = ("split/class", "class", "domain/split/class", "domain/class")
_SUFFIXES = frozenset(("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"))
_WNID = re.compile(r"n\d{8}")
_DEFAULT_SHARE = 0.2


def read(path: str, options: Options) -> RawImages:
    """Options: layout (one of ``LAYOUTS``; seen from the folders where absent), labels, splits, test_share (0.2),
    split_seed. With ``labels``, a CSV or JSON file below the root, folders need not name classes.
    """
    root = path.rstrip("/")
    files = image_files(root)
    labels_file = options.get("labels", "").removeprefix("./")
    splits = _split_names(files, options)
    if not labels_file:
        layout = options.get("layout", "split/class" if splits else "class")
        if layout not in LAYOUTS:
            raise ConfigError(f"options.layout is {layout!r}; use one of {', '.join(LAYOUTS)}")
        return from_folders(root, files, layout, options, {})
    if "layout" in options:
        raise ConfigError("options.labels and options.layout don't go together: the file gives the classes")
    return _from_labels(root, [name for name in files if name != labels_file], labels_file, splits, options)


def read_imagenet_r(path: str, options: Options) -> RawImages:
    """``<root>/<WordNet id>/*.jpg``; a fifth of every class to test. Options: test_share (0.2), split_seed."""
    root = path.rstrip("/")
    files = image_files(root)
    if not any("/" in name and _WNID.fullmatch(name.split("/")[0]) for name in files) and any(
        name.startswith("imagenet-r/") for name in files
    ):
        root = join(root, "imagenet-r")
        files = image_files(root)
    odd = sorted({name.split("/")[0] for name in files if "/" in name and not _WNID.fullmatch(name.split("/")[0])})
    if odd:
        raise DataError(f"{root}: folder {odd[0]!r} is no WordNet id such as n01443537; is this ImageNet-R?")
    return from_folders(root, files, "class", options, {"classes_per_task": 20})


def image_files(root: str) -> list[str]:
    """Paths below the root in natural order, hidden files and folders left out; DataError where there are none."""
    files = [name for name in list_files(root) if not any(part.startswith(".") for part in name.split("/"))]
    if not files:
        raise DataError(f"{root}: no files are there")
    return sorted(files, key=lambda name: [natural(part) for part in name.split("/")])


def _split_names(files: Sequence[str], options: Options) -> dict[str, str] | None:
    """{our split: folder} where the top folders are splits."""
    asked = options.get("splits", {})
    tops = {name.split("/")[0] for name in files if "/" in name}
    known = {name for names in SPLIT_NAMES.values() for name in names} | set(asked.values())
    return None if not tops or tops - known else {top: top for top in tops}


def from_folders(
    root: str, files: Sequence[str], layout: str, options: Options, defaults: Mapping[str, int]
) -> RawImages:
    """Rows by the folders that their files lie in."""
    roles = layout.split("/")
    rows: list[ImageRow] = []
    sides: list[str | None] = []
    for name in files:
        *parents, _ = name.split("/")
        if len(parents) != len(roles):
            rows.append(ImageRow(name, name, None, problem=f"file is not at {layout}/"))
            sides.append(None)
            continue
        at = dict(zip(roles, parents, strict=True))
        problem = None if _is_image(name) else "file is not an image by its name"
        rows.append(ImageRow(name, name, at["class"], at.get("domain"), problem))
        sides.append(at.get("split"))
    if not any(row.label for row in rows):
        raise DataError(f"{root}: no file lies at {layout}/; choose options.layout from {', '.join(LAYOUTS)}")
    return RawImages(root, _splits(root, rows, sides, "split" in roles, options), defaults)


def _splits(
    root: str, rows: Sequence[ImageRow], sides: Sequence[str | None], has_splits: bool, options: Options
) -> dict[str, RawSplit]:
    whole = RawSplit(rows, lambda wanted: loaders(wanted, lambda i: read_bytes(join(root, rows[i].place))))
    if not has_splits:
        if "splits" in options:
            raise ConfigError("options.splits needs folders for splits; options.test_share cuts a test set")
        return split_by_share(whole, *test_share(options, _DEFAULT_SHARE))
    if "test_share" in options:
        raise ConfigError(f"options.test_share: {root} has splits of its own")
    chosen = choose_splits(root, {side for side in sides if side is not None}, options)
    # Files that lie nowhere are told of with the training images.
    parts = {
        split: [i for i, side in enumerate(sides) if side == chosen[split] or (side is None and split == "train")]
        for split in SPLITS
        if split in chosen
    }
    return {split: whole.part(part) for split, part in parts.items()}


def _from_labels(
    root: str, files: Sequence[str], labels_file: str, splits: Mapping[str, str] | None, options: Options
) -> RawImages:
    where = join(root, labels_file)
    labels = read_labels(where)
    classes = frozenset(label for label in labels.values() if label)
    rows = []
    for name in files:
        label = labels.get(name)
        problem = None if _is_image(name) else "file is not an image by its name"
        if name in labels:
            folder_label(where, name, label, classes)
        elif problem is None:
            problem = "image is not in the label file"
        rows.append(ImageRow(name, name, label, problem=problem))
    there = set(files)
    rows += [
        ImageRow(name, name, label, problem="file is missing") for name, label in labels.items() if name not in there
    ]
    if not any(row.problem is None for row in rows):
        raise DataError(f"{where}: names no image below {root}; file names are paths from there")
    sides = [row.place.split("/")[0] if splits else None for row in rows]
    sides = [side if splits and side in splits else None for side in sides]
    return RawImages(root, _splits(root, rows, sides, splits is not None, options), {})


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in _SUFFIXES
