"""Tables for people and for programs: one `Sheet` on the terminal, as Markdown, as Parquet and as CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from treelora.data.files import write_bytes_atomically
from treelora.simulation.statistics import Interval
from treelora_platform.csv_text import csv_text
from treelora_platform.summary import NOT_MEASURED

if TYPE_CHECKING:
    from rich.table import Table

Cells = tuple[str, ...]
Item = TypeVar("Item")
LEAST_WIDTH = 20


@dataclass(frozen=True)
class Sheet:
    """A table: texts for people, and the records that they were made of."""

    name: str
    title: str
    columns: Cells
    cells: tuple[Cells, ...]
    """A row each; an empty one stands for a line between groups."""
    records: Sequence[Any]
    """Dataclass instances, or mappings."""
    notes: tuple[str, ...] = ()
    texts: int = 1
    """So many columns from the left hold text, the others numbers."""
    spare: Cells = ()
    """Columns of numbers that a narrow terminal does without, the first to go first; files have them all."""


def render(sheet: Sheet, width: int | None = None) -> Table:
    """For the terminal, without columns that it is too narrow for; `width` in letters, None: as wide as need be."""
    from rich.table import Table
    from rich.text import Text

    if width:
        sheet = _fitted(sheet, width)

    table = Table(title=sheet.title, caption="\n".join(sheet.notes), caption_justify="left", pad_edge=False)
    for i, column in enumerate(sheet.columns):
        longest = max((len(row[i]) for row in sheet.cells if row), default=0)
        # names are told apart by their ends, which a narrow terminal would cut off
        least = min(longest, LEAST_WIDTH) if i < sheet.texts else None
        table.add_column(column, justify="left" if i < sheet.texts else "right", min_width=least)
    for row in sheet.cells:
        if row:
            table.add_row(*(Text(cell) for cell in row))
        else:
            table.add_section()
    return table


def _fitted(sheet: Sheet, width: int) -> Sheet:
    from rich.cells import cell_len

    widths = {
        name: max(cell_len(text) for text in (name, *(row[i] for row in sheet.cells if row)))
        for i, name in enumerate(sheet.columns)
    }
    gone: list[str] = []
    for name in sheet.spare:
        if sum(widths.values()) + 3 * len(widths) - 1 <= width:  # two spaces and a line between any two
            break
        del widths[name]
        gone.append(name)
    if not gone:
        return sheet
    kept = [i for i, name in enumerate(sheet.columns) if name in widths]
    return replace(
        sheet,
        columns=tuple(widths),
        cells=tuple(tuple(row[i] for i in kept) if row else row for row in sheet.cells),
        notes=(*sheet.notes, f"left out, for want of room: {', '.join(gone)}; the files have them"),
    )


def markdown(sheets: Sequence[Sheet], heading: str, remarks: Sequence[str] = ()) -> str:
    """All tables as one page."""
    parts = [f"# {heading}", *([bullets(remarks)] if remarks else [])]
    for sheet in sheets:
        rule = ["---" if i < sheet.texts else "---:" for i in range(len(sheet.columns))]
        rows = [sheet.columns, tuple(rule), *(row for row in sheet.cells if row)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts += [f"## {sheet.title}", "\n".join(lines), bullets(sheet.notes)]
    return "\n\n".join(parts) + "\n"


def write_sheets(folder: Path, sheets: Sequence[Sheet]) -> list[Path]:
    """The records of each as Parquet and CSV; intervals become columns with `_low` and `_high`."""
    return [path for sheet in sheets if sheet.records for path in write_table(folder, sheet.name, records_table(sheet))]


def write_table(folder: Path, name: str, table: pa.Table) -> list[Path]:
    """A table as Parquet and as CSV, which leaves out columns of lists."""
    import pyarrow.parquet as pq

    parquet = pa.BufferOutputStream()
    pq.write_table(table, parquet, compression="zstd")
    flat = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    text = csv_text(flat, ([row[column] for column in flat] for row in table.to_pylist()))
    paths = [folder / f"{name}.parquet", folder / f"{name}.csv"]
    for path, payload in zip(paths, (parquet.getvalue(), text.encode()), strict=True):
        write_bytes_atomically(path, payload)
    return paths


def records_table(sheet: Sheet) -> pa.Table:
    """Records as columns; NaN and None are both null."""
    rows = [_flat(record) for record in sheet.records]
    keys = dict.fromkeys(key for row in rows for key in row)
    for key in [key for key in keys if any(other.startswith(f"{key}_") for other in keys)]:
        if all(row.get(key) is None for row in rows):
            del keys[key]  # a part that the first records lack; its own columns are there
    arrays = [pa.array([row.get(key) for row in rows]) for key in keys]
    return pa.table([a.cast(pa.float64()) if pa.types.is_null(a.type) else a for a in arrays], names=list(keys))


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    if not is_dataclass(record):
        return dict(record)
    flat: dict[str, Any] = {}
    for field in fields(record):
        value, name = getattr(record, field.name), prefix + field.name
        if isinstance(value, Interval):
            ends = {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            flat |= {key: None if math.isnan(end) else end for key, end in ends.items()}
        elif is_dataclass(value):
            flat |= _flat(value, f"{name}_")
        else:
            flat[name] = value
    return flat


def show_interval(found: Interval | None, digits: int = 1, sign: bool = False, ends: bool = True) -> str:
    """`45.3 [43.0, 47.9]`; a dash for what was not measured, the value alone where its ends aren't known."""
    if found is None:
        return NOT_MEASURED
    plus = "+" if sign else ""
    value = f"{found.value:{plus}.{digits}f}"
    return value if math.isnan(found.low) or not ends else f"{value} {show_ends(found, digits)}"


def show_ends(found: Interval, digits: int = 1) -> str:
    """`[43.0, 47.9]`."""
    return NOT_MEASURED if math.isnan(found.low) else f"[{found.low:.{digits}f}, {found.high:.{digits}f}]"


def in_blocks(items: Sequence[Item], block: Callable[[Item], Any], cells: Callable[[Item], Cells]) -> tuple[Cells, ...]:
    """A row for each item, with an empty one wherever a new block begins."""
    rows: list[Cells] = []
    for before, item in zip([None, *items], items, strict=False):
        if before is not None and block(before) != block(item):
            rows.append(())
        rows.append(cells(item))
    return tuple(rows)


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
