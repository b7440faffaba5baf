"""What image readers share: rows without their bytes, splitting by seed, checking options."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from treelora.data.importers.common import Options
from treelora.errors import ConfigError, DataError

Loader = Callable[[], bytes]
"""Gives the encoded bytes of one image; may be called from any thread."""


@dataclass(frozen=True)
class ImageRow:
    """One source row without its bytes. ``place`` is what a user finds it by; ``problem`` says why it is useless."""

    place: str
    id: str
    label: str | None
    domain: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class RawSplit:
    """Rows of a split and the way to their bytes: ``load`` takes ascending indices, a loader for each, lazily."""

    rows: Sequence[ImageRow]
    load: Callable[[Iterable[int]], Iterable[Loader]]

    def part(self, chosen: Sequence[int]) -> "RawSplit":
        """Some of the rows, by ascending indices."""
        load = self.load
        return RawSplit([self.rows[i] for i in chosen], lambda wanted: load(chosen[i] for i in wanted))


@dataclass(frozen=True)
class RawImages:
    """A labelled data set. ``defaults`` are the protocol options of this source where the user gives none."""

    where: str
    splits: Mapping[str, RawSplit]
    defaults: Mapping[str, Any]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts "class 2" before "class 10"."""
    parts = re.split(r"([0-9]+)", name)
    # A number is compared by its length and then its digits: int() refuses thousands of them.
    plain = [part.lstrip("0") if part[:1].isdecimal() else part.casefold() for part in parts]
    numbers = [part[:1].isdecimal() for part in parts]
    key = [(0, len(text), text) if number else (1, 0, text) for text, number in zip(plain, numbers, strict=True)]
    return [item for item, part in zip(key, parts, strict=True) if part], name


def permutation(n: int, *key: object) -> npt.NDArray[np.int64]:
    """A permutation of ``n`` items, int64 [n]: the order of raw Philox numbers under a key hashed from ``key``.

    Counter-based (Salmon et al., SC 2011) and stable across numpy versions, unlike ``Generator.permutation``.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode("utf-8", "surrogatepass")).digest()
    words = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
    return np.argsort(np.random.Philox(key=words).random_raw(n), kind="stable").astype(np.int64)


def whole_option(options: Options, key: str, default: int | None, least: int) -> int | None:
    """A whole number among the options; ConfigError for anything else."""
    value = options.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"options.{key} is {value!r}; use a whole number of at least {least}")
    return value


def test_share(options: Options, default: float) -> tuple[float, int]:
    """Share of each class that goes to test, and the seed that says which images."""
    share = options.get("test_share", default)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
        raise ConfigError(f"options.test_share is {share!r}; use a number between 0 and 1")
    return float(share), whole_option(options, "split_seed", 0, 0) or 0


test_share.__test__ = False  # type: ignore[attr-defined]


def split_by_share(whole: RawSplit, share: float, seed: int) -> dict[str, RawSplit]:
    """Train and test of a data set that has no splits of its own: the same share of every class.

    Of n images of a class (and domain) round(share * n) go to test, at least one and never all; a class of one
    image goes to training, and so do rows with a problem. Which ones depends on the seed, the class and n alone, not
    on the other classes.
    """
    groups: dict[tuple[str | None, str | None], list[int]] = {}
    for index, row in enumerate(whole.rows):
        if row.problem is None:
            groups.setdefault((row.domain, row.label), []).append(index)
    test: set[int] = set()
    for (domain, label), members in groups.items():
        n = len(members)
        count = min(max(round(share * n), 1), n - 1)
        order = permutation(n, "split", seed, domain, label)
        test.update(members[int(i)] for i in order[:count])
    train = [index for index in range(len(whole.rows)) if index not in test]
    return {"train": whole.part(train), "test": whole.part(sorted(test))}


def array_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """PNG of uint8 [H, W] (grey) or [H, W, 3]; the same pixels give the same bytes."""
    import io

    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(sink, format="PNG")
    return sink.getvalue()


def one_of(where: str, options: Mapping[str, str], hint: str) -> str:
    """The folder among candidates {folder: file it must hold} whose file exists; DataError with the hint."""
    from treelora.data.files import join
    from treelora.data.importers.report import exists

    for folder, marker in options.items():
        if exists(join(folder, marker)):
            return folder
    raise DataError(f"{where}: {hint}")


def loaders(indices: Iterable[int], make: Callable[[int], bytes]) -> Iterator[Loader]:
    """Loaders that call ``make`` with their index."""
    for index in indices:
        yield lambda index=index: make(index)  # type: ignore[misc]
