"""An Arrow extension type whose code tells when it is run, as that of a hostile file would be."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


@contextmanager
def loud_column() -> Iterator[tuple[pa.Array, list[str]]]:
    """A column of one row, and a list that grows whenever reading the type from a file runs its code."""
    ran: list[str] = []

    class Loud(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.string(), "treelora.tests.loud")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"payload"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: pa.DataType, payload: bytes) -> "Loud":
            ran.append("code")
            return cls()

    pa.register_extension_type(Loud())
    try:
        column = pa.ExtensionArray.from_storage(Loud(), pa.array(["p"]))
        ran.clear()
        yield column, ran
    finally:
        pa.unregister_extension_type("treelora.tests.loud")
