"""Canvas: a matplotlib figure while it is drawn, and its export as an SVG for a page or a file.

The colors of ink, grid and paper are CSS variables of the page (``--ink``, ``--mute``,
``--line``, ``--paper``), so that a figure is readable in light and dark. Renderers without CSS
variables use the light colors.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from dsbs.formatting import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1d2330"
MUTE = "#5c6678"
LINE = "#d7dce5"
PAPER = "#ffffff"
_VARIABLES = {INK: "--ink", MUTE: "--mute", LINE: "--line", PAPER: "--paper"}
_DARK = {"--ink": "#e6e9ef", "--mute": "#9aa5b8", "--line": "#39414f", "--paper": "#14171d"}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_FONTS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r'(?:url\(|href=")#([^)"]+)')
_GEOMETRY = ("d", "x", "y", "transform", "width", "height")
_NAME_LENGTH = 36  # characters of a name from data in a figure
_PIXELS_PER_POINT = 4 / 3

_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a label is a dollar
    "font.family": "sans-serif",
    # comes with matplotlib, and is wider than the fonts that pages are read in
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTE,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.handlelength": 2.4,
    "legend.fontsize": 9,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.7,
    "lines.markersize": 6,
    "text.color": INK,
    "xtick.color": MUTE,
    "ytick.color": MUTE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A finished figure. ``svg`` is one <svg> element whose ids begin with ``name``."""

    name: str
    title: str
    caption: str
    svg: str

    @property
    def standalone(self) -> str:
        """The figure as a file, which follows the reader's light or dark scheme by itself."""
        light = " ".join(f"{variable}: {color};" for color, variable in _VARIABLES.items())
        dark = " ".join(f"{variable}: {color};" for variable, color in _DARK.items())
        style = (
            f"<style>svg {{ {light} background: var(--paper) }} "
            f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
        )
        start = self.svg.index(">") + 1  # attributes escape theirs
        element = f"{self.svg[:start]}{style}{self.svg[start:]}"
        return f'<?xml version="1.0" encoding="utf-8"?>\n{element}\n'


def is_own_file(path: Path) -> bool:
    """Whether an SVG file was written here: it has an id of its name and of its caption."""
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(1000)
    return f'id="{path.stem}"' in start and f'aria-describedby="{path.stem}-caption"' in start


@contextmanager
def open_canvas(
    name: str,
    *,
    width: float = 5.4,
    height: float = 3.3,
    panels: int = 1,
    columns: int = 1,
    share: str = "",
) -> Iterator[Canvas]:
    """A canvas of ``panels`` panels in ``columns`` columns.

    ``width`` is the canvas's and ``height`` a panel's, in inches. ``share`` names shared axes: "x",
    "y" or "xy".
    """
    import matplotlib as mpl

    # ids are salted with the name: equal results give equal files, and figures share no id
    with mpl.rc_context(_SETTINGS | {"svg.hashsalt": name}):
        yield Canvas(name, (width, height), panels, min(columns, panels), share)


class Canvas:
    """A figure while it is drawn."""

    def __init__(
        self, name: str, size: tuple[float, float], panels: int, columns: int, share: str
    ) -> None:
        from matplotlib.figure import Figure as MatplotlibFigure

        self.name = name
        self._tooltips: dict[str, str] = {}
        rows = -(-panels // columns)
        self._figure = MatplotlibFigure(figsize=(size[0], size[1] * rows), layout="constrained")
        self._figure.patch.set_visible(False)
        grid = list(
            self._figure.subplots(
                rows, columns, squeeze=False, sharex="x" in share, sharey="y" in share
            ).flat
        )
        self.axes: list[Axes] = grid[:panels]
        for unused in grid[panels:]:
            unused.remove()
        self.first_column = self.axes[::columns]
        self.last_row = self.axes[-columns:]
        for axes in self.last_row:  # a panel above an empty place has its own tick labels
            axes.xaxis.set_tick_params(labelbottom=True)

    def tooltip(self, artist: Any, text: str) -> None:
        """Show ``text`` when the pointer is on ``artist``."""
        gid = f"tip{len(self._tooltips)}"
        self._tooltips[gid] = text
        artist.set_gid(gid)

    def legend(self, entries: Sequence[tuple[Any, str]]) -> None:
        """A legend below all panels, in as many columns as fit. The figure grows by its height."""
        handles, names = zip(*entries, strict=True)
        width, height = self._figure.get_size_inches()
        entry_width = 0.58 + 0.07 * max(map(len, names))  # inches of a handle and its name
        columns = max(1, min(len(names), 3, int((width - 0.2) / entry_width)))
        self._figure.set_size_inches(width, height + 0.1 + 0.19 * -(-len(names) // columns))
        self._figure.legend(handles, names, loc="outside lower center", ncols=columns)

    def finish(self, title: str, caption: str) -> Figure:
        text = io.StringIO()
        with warnings.catch_warnings():
            # the reader's font may have the glyph
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self._figure.savefig(text, format="svg", transparent=True)
        return Figure(self.name, title, caption, self._embed(text.getvalue(), title, caption))

    def _embed(self, svg: str, title: str, caption: str) -> str:
        """matplotlib's file as one element that neither affects the page nor is affected by it."""
        ElementTree.register_namespace("", _SVG)
        ElementTree.register_namespace("xlink", _XLINK)
        root = ElementTree.fromstring(svg)
        for parent in list(root.iter()):
            for child in list(parent):
                if child.tag.rpartition("}")[2] in ("metadata", "style"):  # a style is global
                    parent.remove(child)
        for element in root.iter():
            _set_style(element)
            for key in _GEOMETRY:
                if key in element.attrib:
                    element.set(key, _LONG_NUMBER.sub(_two_decimals, element.attrib[key]))
            if element.get("id") in self._tooltips:
                element.insert(0, _text_element("title", self._tooltips[element.attrib["id"]]))
        self._prefix_ids(root)
        _, _, width, height = root.attrib["viewBox"].split()
        root.attrib.pop("version", None)
        root.attrib |= {
            "width": f"{float(width) * _PIXELS_PER_POINT:.0f}",
            "height": f"{float(height) * _PIXELS_PER_POINT:.0f}",
            "id": self.name,
            "role": "img",
            "aria-labelledby": f"{self.name}-title",
            "aria-describedby": f"{self.name}-caption",
            "font-family": _FONTS,
            "stroke-linejoin": "round",  # as matplotlib's own style says
            "stroke-linecap": "butt",
        }
        root.insert(0, _text_element("title", title, id=f"{self.name}-title"))
        root.insert(1, _text_element("desc", caption, id=f"{self.name}-caption"))
        return ElementTree.tostring(root, encoding="unicode")

    def _prefix_ids(self, root: ElementTree.Element) -> None:
        """Keep only ids that something refers to, and put the figure's name before them."""
        referenced = set(_REFERENCE.findall(ElementTree.tostring(root, encoding="unicode")))
        for element in root.iter():
            element_id = element.attrib.pop("id", None)
            if element_id in referenced:
                element.set("id", f"{self.name}-{element_id}")
            for key, value in element.attrib.items():
                if key == f"{{{_XLINK}}}href":
                    element.set(key, f"#{self.name}-{value[1:]}")
                elif "url(#" in value:
                    element.set(key, value.replace("url(#", f"url(#{self.name}-"))


def _two_decimals(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}"


def _text_element(tag: str, text: str, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(f"{{{_SVG}}}{tag}", attributes)
    element.text = text
    return element


def _set_style(element: ElementTree.Element) -> None:
    """The page's colors as variables, with a plain attribute as fallback, and the page's font."""
    if "style" not in element.attrib:
        return
    declarations = []
    for declaration in element.attrib.pop("style").split(";"):
        key, _, value = (text.strip() for text in declaration.partition(":"))
        if not key or key == "font-family":
            continue
        if key in ("fill", "stroke") and value in _VARIABLES:
            element.set(key, value)
            value = f"var({_VARIABLES[value]}, {value})"
        declarations.append(f"{key}: {value}")
    element.set("style", "; ".join(declarations))


def shorten(text: str, max_length: int = _NAME_LENGTH) -> str:
    """A name from data, on one line and short enough for a legend or an axis."""
    return one_line(text, max_length)
