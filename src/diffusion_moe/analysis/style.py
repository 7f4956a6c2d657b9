"""Style of figures and their files: one width for phone and desktop, colours for light and dark pages."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH = 4.5
"""Width of every figure in inches, so that its text can be read on a phone."""
_STYLE = matplotlib.rc_params_from_file(Path(__file__).with_name("report.mplstyle"), use_default_template=False)
INK, PAPER = _STYLE["text.color"], _STYLE["figure.facecolor"]
"""Placeholders: a page that shows the SVG replaces them by its own text colour and no background."""
LINES = ("#2f7fd1", "#d1600f", "#17906a", "#b455b6", "#8f7a12", "#6f7d8c")
"""Colours of curves; each has a contrast of at least 3 with a white and with a near-black page."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)))
"""Dashes of curves, for readers who cannot distinguish the colours."""
MANY = 24
"""Most columns that all have names."""

# Zero is grey, which stands out on neither paper.
DIVERGING = LinearSegmentedColormap.from_list(
    "blue-grey-orange", ["#1257a8", "#8fb3da", "#9c9c9c", "#f0b27a", "#b84a00"]
)


class Panel(NamedTuple):
    """One figure of a report, or why there is none."""

    title: str
    caption: str
    """Contents, units and number of images; without a figure, the reason."""
    figure: Figure | None = None
    name: str = ""
    """Name of its files and anchor in the report; see `run.panels`."""


@contextmanager
def figure_style() -> Iterator[None]:
    """Apply the style, without warnings about letters that the font lacks (class names may be in any script)."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def line(i: int) -> dict[str, Any]:
    """Colour and dashes of curve i; they repeat after the last."""
    return {"color": LINES[i % len(LINES)], "ls": DASHES[i % len(DASHES)]}


def new_figure(height: float) -> Figure:
    """An empty figure, height in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def new_axes(height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, height in inches."""
    figure = new_figure(height)
    return figure, figure.subplots()


def lay_out(figure: Figure) -> None:
    """Lay a figure out once, for all its files: with a layout engine matplotlib draws it twice for each."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def to_png(figure: Figure) -> bytes:
    """A PNG on white paper, 200 dots an inch."""
    file = io.BytesIO()
    with figure_style():
        lay_out(figure)
        figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return file.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """An SVG with text as text; the same figure and name give the same bytes. Ids start with the name."""
    file = io.StringIO()
    with figure_style(), matplotlib.rc_context({"svg.hashsalt": name}):
        lay_out(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # Verdana is as wide; where neither is there, most fonts are narrower and still fit.
    return svg[svg.index("<svg") :].replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def for_page(svg: str, label: str) -> str:
    """An SVG for a page, with the page's text colour and width."""
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = rf'<svg role="img" aria-label="{label}" \1 {namespaces}>'
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', opening, svg, count=1)
    return svg.replace(f"fill: {PAPER}", "fill: none").replace(INK, "currentColor")


def heat_map(axes: Axes, values: np.ndarray, **options: Any) -> Any:
    """Plot a heat map with NaN in faint grey. Rows are experts or layers, the first on top."""
    image = axes.imshow(np.ma.masked_invalid(values), aspect=options.pop("aspect", "auto"), **options)
    image.set_cmap(image.get_cmap().with_extremes(bad=(0.5, 0.5, 0.5, 0.15)))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2, width=0.6)
    return image


def color_scale(figure: Figure, image: Any, axes: Any, label: str) -> None:
    """Add a thin colour bar under the axes."""
    bar = figure.colorbar(image, ax=axes, label=label, location="bottom", aspect=35, pad=0.02)
    bar.outline.set_visible(False)


def legend_above(axes: Axes) -> None:
    """Add a legend above the axes."""
    longest = max(len(text) for text in axes.get_legend_handles_labels()[1])
    columns = max(1, min(3, 40 // longest))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


class Names(NamedTuple):
    """Names of columns under a heat map or a row of points."""

    positions: range
    """Columns with a name, some of many."""
    short: list[str]
    angle: int
    """Degrees; 90 where they need more room."""

    @property
    def height(self) -> float:
        """Additional height that a figure needs for them, in inches."""
        return 0.0 if self.angle == 0 else 0.07 * max(map(len, self.short))


def column_names(names: Sequence[str], room: int = 30) -> Names:
    """Shortened names of columns, or of some of many, for a room of so many letters."""
    positions = range(0, len(names), 1 if len(names) <= MANY else -(-len(names) // 8))
    short = [shorten(names[i]) for i in positions]
    return Names(positions, short, 90 if sum(map(len, short)) + len(short) > room else 0)


def name_columns(axes: Axes, names: Names, what: str) -> None:
    """Write them under the axes."""
    axes.set_xticks(names.positions, names.short, rotation=names.angle)
    axes.set_xlabel(what)


def shorten(name: str, length: int = 16) -> str:
    """The first of several names, cut to a length."""
    name = name.split(",")[0].strip()
    return name if len(name) <= length else name[: length - 1] + "…"


def expert_ticks(axes: Axes, experts: int, axis: str = "y", room: int = 16) -> None:
    """Experts by number from 0; of more than there is room for every second, fourth, ..."""
    step = 1
    while experts > room * step:
        step *= 2
    ticks = range(0, experts, step)
    getattr(axes, f"set_{axis}ticks")(ticks, [str(e) for e in ticks])


def layer_ticks(axes: Axes, layers: int) -> None:
    """MoE layers by number from 1, as rows; at most twelve."""
    ticks = range(0, layers, -(-layers // 12))
    axes.set_yticks(ticks, [str(layer + 1) for layer in ticks])


def write_numbers(axes: Axes, values: np.ndarray, image: Any) -> None:
    """The numbers into the cells of a heat map."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = readable_on(image.cmap(image.norm(value)))
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=color, fontsize=6.5)


def readable_on(color: Sequence[float]) -> str:
    """Black or white, whichever is read better on a colour (red, green, blue in [0, 1])."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])  # sRGB
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#ffffff"
