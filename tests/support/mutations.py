"""Harm done to files, for tests that a reader answers any input with a result or with our own error."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

TEXTS = st.text(max_size=8) | st.sampled_from(["", "..", "../../x", "/etc/passwd", "a\0b", "\ud800", "9" * 5000, "NaN"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Harm:
    """One change of one file of a folder; ``at`` in [0, 1) says where, so that it fits files of any length."""

    file: int
    kind: str
    at: float
    data: bytes
    value: Any

    def do(self, folder: Path) -> None:
        """Change the file with that number, counted round, among the folder's files."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            return
        path = files[self.file % len(files)]
        whole = path.read_bytes()
        here = int(self.at * len(whole))
        match self.kind:
            case "remove":
                path.unlink()
            case "cut":
                path.write_bytes(whole[:here])
            case "overwrite":
                path.write_bytes(whole[:here] + self.data + whole[here + len(self.data) :])
            case "insert":
                path.write_bytes(whole[:here] + self.data + whole[here:])
            case "replace":
                path.write_bytes(self.data)
            case "folder":
                path.unlink()
                path.mkdir()
            case "value":
                path.write_bytes(self._with_other_value(whole))

    def _with_other_value(self, whole: bytes) -> bytes:
        """One value of a JSON file, or of one line of a file of such lines, replaced; else the bytes as they are."""
        lines = [whole] if _parsed(whole) is not None else whole.splitlines()
        number = int(self.at * len(lines)) if lines else 0
        parsed = _parsed(lines[number]) if lines else None
        if parsed is None:
            return whole
        places = list(_places(parsed[0]))
        changed = self.value
        if places and (choice := int(self.at * 7919) % (len(places) + 1)) < len(places):
            container, key = places[choice]
            container[key] = self.value
            changed = parsed[0]
        lines[number] = json.dumps(changed).encode()
        return b"\n".join(lines)


HARMS = st.lists(
    st.builds(
        Harm,
        st.integers(0, 11),
        st.sampled_from(["value", "value", "overwrite", "insert", "cut", "replace", "remove", "folder"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=24),
        VALUES,
    ),
    min_size=1,
    max_size=3,
)


def _parsed(text: bytes) -> tuple[Any] | None:
    try:
        return (json.loads(text),)
    except ValueError:
        return None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


@contextmanager
def within(seconds: int, what: Callable[[], str]) -> Iterator[None]:
    """Fail where the block hangs: an alarm ends it, wherever it waits."""

    def ring(*_: object) -> None:
        raise AssertionError(f"no answer within {seconds} s: {what()}")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
