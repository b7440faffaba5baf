"""What the HTML pages share: templates that escape, figures inside the page, downloads inside the page.

A page is one file. It fetches nothing, and its Content-Security-Policy forbids a browser to try.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from treelora_platform.canvas import COLOURS, render, to_svg
from treelora_platform.csv_text import csv_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure

PAPER = "#fefefe"
"""What a figure draws in the ground's colour: white in a file, the page's own in a page."""
TALL = 16  # rows


@dataclass(frozen=True)
class Download:
    """A file that a link in the page holds."""

    name: str
    href: str


@dataclass(frozen=True)
class Chart:
    """A figure in the page, its caption, and itself as a file."""

    name: str
    svg: Markup
    caption: str
    file: Download


@dataclass(frozen=True)
class Cell:
    """A text in a table; `sort` is the number to sort by, empty text for what was not measured, None for texts."""

    text: str
    sort: float | str | None = None
    href: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table; `gap` draws a line above it."""

    cells: Sequence[Cell]
    anchor: str | None = None
    gap: bool = False


@dataclass(frozen=True)
class Table:
    """A table in the page, and itself as a file; the first `texts` columns hold texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    file: Download
    notes: Sequence[str] = ()
    texts: int = 1
    sortable: bool = False
    wrap: bool = False

    @property
    def tall(self) -> bool:
        """Whether it scrolls in a box of its own."""
        return len(self.rows) > TALL


@dataclass(frozen=True)
class Part:
    """A piece of a section: heading, text, figures one below the other, figures side by side, tables."""

    title: str = ""
    anchor: str | None = None
    text: str = ""
    link: tuple[str, str] | None = None
    """Address and text of a link after the text."""
    charts: Sequence[Chart] = ()
    row: Sequence[Chart] = ()
    fold: str = ""
    """What the figures side by side are folded behind."""
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Section:
    """A section of a page, with an anchor for links."""

    anchor: str
    title: str
    parts: Sequence[Part]
    lead: str = ""


def render_page(template: str, **values: Any) -> bytes:
    """A template of this package with these values, all texts escaped."""
    return _environment().get_template(template).render(values).encode()


def own_script(template: str) -> dict[str, Any]:
    """`script`, a script of this package, and `script_hash`, by which a page's policy lets it run and no other."""
    from markupsafe import Markup

    script = _environment().get_template(template).render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "script_hash": f"sha256-{digest}"}


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("treelora_platform", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def inline_svg(figure: Figure, name: str, label: str = "") -> Markup:
    """The figure as an element of the page, whose colours are the page's: `--c1` and so on, and its text's."""
    from markupsafe import Markup, escape

    svg = to_svg(figure, name).replace(PAPER, "var(--paper)")
    for i, colour in enumerate(COLOURS, start=1):
        svg = svg.replace(colour.lower(), f"var(--c{i})")
    # matplotlib escapes the texts of a figure, so it is markup
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label or name)}"', 1))


def chart(figure: Figure, name: str, caption: str) -> Chart:
    """The figure in the page, and as a file that stands alone."""
    return Chart(name, inline_svg(figure, name, caption), caption, svg_download(figure, name))


def svg_download(figure: Figure, name: str) -> Download:
    """The figure as an SVG file: dark ink on no ground."""
    data = base64.b64encode(render(figure, "svg")).decode()
    return Download(f"{name}.svg", f"data:image/svg+xml;base64,{data}")


def csv_download(name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Download:
    """A table as a CSV file."""
    return Download(f"{name}.csv", f"data:text/csv;charset=utf-8,{quote(csv_text(columns, rows))}")
