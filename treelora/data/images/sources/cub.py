"""CUB-200-2011: 11,788 images of 200 bird species with a split of their own.

Wah et al., Caltech technical report CNS-TR-2011-001, https://www.vision.caltech.edu/datasets/cub_200_2011/.
"""

from treelora.data.files import join
from treelora.data.images.sources.common import ImageRow, RawImages, RawSplit, loaders, one_of
from treelora.data.importers.common import Options, list_files, read_bytes, read_text
from treelora.errors import DataError


def read(path: str, options: Options) -> RawImages:
    """images.txt, image_class_labels.txt, classes.txt, train_test_split.txt and images/, here or in CUB_200_2011/.

    Raises DataError where the text files don't fit each other, or an image's class and its folder.
    """
    base = path.rstrip("/")
    candidates = {base: "images.txt", join(base, "CUB_200_2011"): "images.txt"}
    root = one_of(base, candidates, "no images.txt; take the folder CUB_200_2011 of CUB_200_2011.tgz")
    names = _table(join(root, "images.txt"))
    classes = _table(join(root, "classes.txt"))
    numbers = _table(join(root, "image_class_labels.txt"), names)
    training = _table(join(root, "train_test_split.txt"), names)
    there = set(list_files(join(root, "images")))
    rows: list[ImageRow] = []
    for key, name in names.items():
        label = classes.get(numbers[key])
        if label is None:
            raise DataError(f"{root}/image_class_labels.txt: image {key} has class {numbers[key]}, not in classes.txt")
        folder = name.rpartition("/")[0]
        if folder != label:
            raise DataError(
                f"{root}/image_class_labels.txt: {name!r} is labelled {label!r}, but lies in the folder of {folder!r}; "
                "unpack the archive again"
            )
        if training[key] not in ("0", "1"):
            raise DataError(f"{root}/train_test_split.txt: image {key} has {training[key]!r}; expected 0 or 1")
        rows.append(ImageRow(f"images/{name}", name, label, problem=None if name in there else "file is missing"))
    whole = RawSplit(rows, lambda wanted: loaders(wanted, lambda i: read_bytes(join(root, rows[i].place))))
    sides = list(training.values())
    splits = {
        split: whole.part([i for i, side in enumerate(sides) if side == flag])
        for split, flag in (("train", "1"), ("test", "0"))
    }
    return RawImages(root, splits, {"classes_per_task": 20})


def _table(uri: str, keys: dict[str, str] | None = None) -> dict[str, str]:
    """{first word: second word} of a file's lines; with ``keys`` it must have exactly those, and takes their order."""
    table: dict[str, str] = {}
    for number, line in enumerate(read_text(uri).splitlines(), 1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 2:
            raise DataError(f"{uri}: line {number}: {line!r} is not two words; is the file damaged?")
        if cells[0] in table:
            raise DataError(f"{uri}: line {number}: number {cells[0]} is there twice")
        table[cells[0]] = cells[1]
    if keys is None:
        return table
    if lost := keys.keys() ^ table.keys():
        raise DataError(f"{uri}: image {min(lost)} is not in both this file and images.txt; unpack the archive again")
    return {key: table[key] for key in keys}
