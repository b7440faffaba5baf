"""Small images made by hand, for tests of the image data layer."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from treelora.data.images import ImageExample
from treelora.data.schema import SplitMeta


def encoded(pixels: Any, format: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    """An array as an encoded image."""
    sink = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(sink, format=format, **options)
    return sink.getvalue()


def noise(seed: int, height: int = 4, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def tiff(channels: int, extra: Sequence[int] | None = None, photometric: int = 2, side: int = 2) -> bytes:
    """An uncompressed TIFF with any number of 8-bit channels, as the specification lays it out."""
    data = bytes(i % 256 for i in range(side * side * channels))
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("H", [side]),
        257: ("H", [side]),
        258: ("H", [8] * channels),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: ("I", [0]),
        277: ("H", [channels]),
        278: ("H", [side]),
        279: ("I", [len(data)]),
    }
    if extra is not None:
        tags[338] = ("H", extra)
    start = 8 + 2 + 12 * len(tags) + 4
    long = sum(struct.calcsize(f"<{len(v)}{t}") for t, v in tags.values() if struct.calcsize(f"<{len(v)}{t}") > 4)
    tags[273] = ("I", [start + long])
    directory, behind = struct.pack("<H", len(tags)), b""
    for tag, (kind, values) in tags.items():
        raw = struct.pack(f"<{len(values)}{kind}", *values)
        directory += struct.pack("<HHI", tag, 3 if kind == "H" else 4, len(values))
        if len(raw) <= 4:
            directory += raw.ljust(4, b"\0")
        else:
            directory += struct.pack("<I", start + len(behind))
            behind += raw
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + behind + data


def meta(split: str = "train", choices: Sequence[str] = ("cat", "dog"), **fields: Any) -> SplitMeta:
    values: dict[str, Any] = {"protocol": "class_incremental", "skipped": {}, "name": "pets", **fields}
    return SplitMeta(kind="image", choices=tuple(choices), metric="accuracy", split=split, source="test", **values)


def examples(count: int, start: int = 0, choices: Sequence[str] = ("cat", "dog"), **size: int) -> list[ImageExample]:
    return [
        ImageExample(f"img-{i}", encoded(noise(i, **size)), choices[i % len(choices)])
        for i in range(start, start + count)
    ]


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def class_folders(root: Path, counts: dict[str, int]) -> None:
    """{"train/cat": 3}: so many PNG files in each folder, all different."""
    for folder, count in counts.items():
        for i in range(count):
            put(root / folder / f"{i}.png", encoded(noise(hash_of(folder) + i)))


def hash_of(text: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(text)) % 10_000_019
