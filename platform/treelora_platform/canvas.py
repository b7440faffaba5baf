"""The canvas that all figures share: size, colours, fonts, and rendering to PNG and SVG.

Colours are Okabe and Ito's, safe for colour-blind readers (https://jfly.uni-koeln.de/color/). Text has one
ink, which an SVG inside a page takes from the page, so that it can be read on dark and light. No text is read
as a formula.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)))
INK = "#3a3f47"
WIDTH = 7.2  # inches
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "treelora",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
}


@contextmanager
def new_figure(height: float, width: float = WIDTH, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A new figure and its axes (an array of them for several rows, which share x); sizes in inches."""
    # without pyplot: no global state, and no window system is asked for
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, 1, sharex=True)


def legend_below(figure: Any, axes: Any) -> None:
    """A legend of the axes' lines below the figure, in as many columns as have room."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        room = int(figure.get_figwidth() * 13 / (max(map(len, labels)) + 8))
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(len(labels), room)))


def draw_matrix(axes: Any, matrix: np.ndarray, fontsize: float, written: int) -> Any:
    """Scores in percent as a heat map, unmeasured ones left blank; numbers up to `written` tasks. Returns the image."""
    from matplotlib import colormaps

    image = axes.imshow(np.ma.masked_invalid(matrix), cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value) and len(matrix) <= written:
            red, green, blue, _ = colormaps["cividis"](value / 100)
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.45 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=fontsize)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def number_tasks(axes: Any, count: int, most: int, fontsize: float) -> None:
    """Number tasks from 1 along both axes, `most` of them at most."""
    ticks = range(0, count, max(1, -(-count // most)))
    labels = [str(i + 1) for i in ticks]
    axes.set_xticks(ticks, labels, fontsize=fontsize)
    axes.set_yticks(ticks, labels, fontsize=fontsize)


def score_bar(figure: Figure, image: Any, axes: Any, fraction: float = 0.03, pad: float = 0.02) -> None:
    """What the colours of `draw_matrix` mean, beside the axes."""
    figure.colorbar(image, ax=axes, label="score (%)", fraction=fraction, pad=pad).outline.set_visible(False)


def render(figure: Figure, extension: str) -> bytes:
    """The figure as a file of that kind, such as `png`."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # names may be in a script that the font lacks; in a page the browser has it
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        if extension == "svg":
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(out, format=extension, dpi=150, facecolor="white")
    figure.set_layout_engine("none")  # places are settled, and to settle them is most of the work of drawing
    return out.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page: the page's text colour, ids that start with `name`."""
    svg = render(figure, "svg").decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)


def short(name: str, width: int = 18) -> str:
    """The name cut to `width` characters; its end is kept, because names of one family differ there."""
    return name if len(name) <= width else f"{name[: width - 5]}…{name[-4:]}"
